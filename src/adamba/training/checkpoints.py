"""
The Trainer's `checkpoint-N` folders, made to be trusted: sealed once every file is written, verified before a resume.

The seal lists each file with its size and hash and is written last, in one piece. A folder without one was
interrupted; one whose files differ from it was damaged. Older checkpoints go only once the new one is sealed.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from adamba.disk import write_whole
from adamba.errors import UserError, one_line
from adamba.fingerprint import KEYS_WITHOUT_EFFECT, hash_file
from adamba.secrets_kept import redacted

logger = logging.getLogger("adamba")

SEAL = "complete.json"
RUN = "run.json"  # in a run's folder of checkpoints: whose they are
MAX_DIFFERENCES = 6
BATCH_KEYS = {"per_device_train_batch_size", "gradient_accumulation_steps"}  # how rows spread; their product counts


def seal(checkpoint: Path) -> None:
    """Vouch for every file that is in the folder now."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL)
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(hash_file, files))
    content = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
    write_whole(checkpoint / SEAL, json.dumps(content, indent=2), durable=True)


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint must not be resumed from, in a few words; `None` if every file is what was sealed."""
    if not (checkpoint / SEAL).is_file():
        return "interrupted while it was written"
    try:
        sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        for name, entry in sealed.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        with ThreadPoolExecutor() as pool:
            for name, digest in zip(sealed, pool.map(lambda name: hash_file(checkpoint / name), sealed), strict=True):
                if digest != sealed[name]["sha256"]:
                    return f"the content of {name} changed"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL} is not readable"
    return None


def last_checkpoint(folder: str | Path) -> str | None:
    """
    The newest checkpoint of a run that is whole, for `trainer.train(resume_from_checkpoint=...)`. Newer ones that are
    not are passed over, and said to be.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        problem = fault(path)
        if problem is None:
            return str(path)
        logger.warning("%s is passed over: %s", path, problem)
    return None


def seal_what_is_saved(trainer: Trainer) -> None:
    """From now on every checkpoint of this Trainer is sealed, and a failed one leaves nothing behind."""
    write = trainer._save_checkpoint

    def save(*args: Any, **kwargs: Any) -> None:
        folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
        if trainer.is_world_process_zero():
            shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
        trainer.accelerator.wait_for_everyone()
        limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None  # nothing goes before the seal
        try:
            write(*args, **kwargs)
            trainer.accelerator.wait_for_everyone()
            if trainer.is_world_process_zero():
                seal(folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not isinstance(error, RuntimeError) or "writ" in str(error):
                shutil.rmtree(folder, ignore_errors=True)
                kept = last_checkpoint(trainer.args.output_dir)
                after = f"the last good checkpoint is {kept}" if kept else "there is no earlier checkpoint"
                raise UserError(f"output_dir: {folder} cannot be written: {one_line(error)}; {after}") from error
            raise
        finally:
            trainer.args.save_total_limit = limit
        if trainer.is_world_process_zero():
            best = trainer.state.best_model_checkpoint
            rotate_checkpoints(trainer.args.output_dir, limit, best_model_checkpoint=best, use_mtime=True)

    trainer._save_checkpoint = save


def sign(folder: Path, record: Mapping[str, Any]) -> None:
    """Write down whose checkpoints a folder holds: `{"code", "inputs", "values", "rows_per_step"}`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RUN, redacted(json.dumps(record, indent=2, default=str)) + "\n")


def differences(folder: Path, record: Mapping[str, Any]) -> list[str] | None:
    """
    What sets the run of a checkpoint folder apart from this one, each in a few words; `None` if it does not say.
    Keys that change no result are left out.
    """
    try:
        theirs = json.loads((folder / RUN).read_text(encoding="utf-8"))
        ours = json.loads(redacted(json.dumps(record, default=str)))
        found = []
        before, now = ({**of["values"], "rows_per_step": of["rows_per_step"]} for of in (theirs, ours))
        for key in sorted({*before, *now} - KEYS_WITHOUT_EFFECT - BATCH_KEYS):
            there, here = before.get(key, "unset"), now.get(key, "unset")
            if there != here:
                found.append(f"{key}: {there} there, {here} here")
        found += [f"other {part}" for part in ("code", "inputs") if theirs[part] != ours[part]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if len(found) > MAX_DIFFERENCES:
        found[MAX_DIFFERENCES:] = [f"and {len(found) - MAX_DIFFERENCES} more"]
    return found


def refuse_foreign(given: Any, own: Path) -> Path | None:
    """
    What the recipe's `resume_from_checkpoint` names, if anything; it must be of the run whose folder is `own`.

    Raises:
        UserError: no such folder, or one of another run, its differences listed.
    """
    if given in (None, True, "true", "True"):
        return None
    named = Path(given)
    if not named.is_dir():
        raise UserError(f"resume_from_checkpoint: {given}: no such folder")
    try:
        record = json.loads((own / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    found = differences(named.parent if named.name.startswith("checkpoint-") else named, record)
    if found is None:
        raise UserError(f"resume_from_checkpoint: {given} does not say which run it is of; only this project's do")
    if found:
        raise UserError(f"resume_from_checkpoint: {given} is of another run ({'; '.join(found)})")
    return named


def checkpoint_to_resume(trainer: Trainer) -> str | None:
    """
    Where this run goes on: the checkpoint, or folder of checkpoints, that the recipe's `resume_from_checkpoint` names,
    else its own last whole one.

    Raises:
        UserError: a checkpoint of another run, its differences listed; one that is damaged; or one that some
            processes do not see.
    """
    trainer.accelerator.wait_for_everyone()  # the first process may still be signing the folder
    found = _checkpoint_found(trainer)
    if trainer.args.world_size > 1:
        seen = gather_object([Path(found).name if found else "none"])
        other = next((rank for rank, name in enumerate(seen) if name != seen[0]), None)
        if other is not None:  # one would train from the start, and all wait for ever
            raise UserError(
                f"output_dir: {trainer.args.output_dir}: process 0 would resume from {seen[0]}, process {other} "
                f"from {seen[other]}; all machines need the same folder of checkpoints (shared storage)"
            )
    return found


def _checkpoint_found(trainer: Trainer) -> str | None:
    """Where this process would go on."""
    own = Path(trainer.args.output_dir)
    given = trainer.args.resume_from_checkpoint
    named = refuse_foreign(given, own)
    if named is None:
        return last_checkpoint(own)
    if not named.name.startswith("checkpoint-"):
        checkpoint = last_checkpoint(named)
        if checkpoint is None:
            raise UserError(f"resume_from_checkpoint: {given} has no whole checkpoint in it")
        return checkpoint
    problem = fault(named)
    if problem is not None:
        raise UserError(f"resume_from_checkpoint: {given}: {problem}")
    return str(named)
