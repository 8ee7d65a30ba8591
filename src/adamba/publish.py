"""Publishing a run: a checkpoint folder is complete or absent.

A published folder holds the weights and the tokenizer; `run.json` says what ran, on what, and those files' hashes;
`recipe.yaml` runs it again; `metrics.json` is flat; `README.md` is the model card; `log_history.json` is the
Trainer's log. All of it is written aside as `<output_dir>.tmp` and renamed at the end. While a run trains, its Trainer
writes `checkpoint-N` into `trainer_dir(output_dir, ...)`, which is outside `output_dir`, and resumes from there.
"""

import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from adamba.disk import write_whole
from adamba.errors import UserError
from adamba.fingerprint import hash_file, run_fingerprint
from adamba.model_card import model_card
from adamba.output_folder import DESCRIBING_FILES, MARK, discard
from adamba.recipe_file import Recipe
from adamba.secrets_kept import redacted

logger = logging.getLogger("adamba")

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "numpy")

Metrics = Mapping[str, float | int | str | bool | None]


def publish(
    source: Any,
    tokenizer: Any,
    output_dir: str | Path,
    recipe: Recipe,
    metrics: Metrics,
    inputs: Mapping[str, str],
) -> Path:
    """Write a finished run to `output_dir`, replacing what was there only once everything is written.

    Every process of a distributed run calls it (gathering shards is a collective); only the main one touches the
    rest.

    Args:
        source: A Trainer (its `save_model` gathers sharded weights), a model with `save_pretrained`, or a function
            that writes the weights into the folder it is given.
        tokenizer: Saved beside the weights; None when `source` writes it.
        output_dir: Where the run's recipe says the checkpoint goes.
        recipe: What `recipe.parse` returned.
        metrics: Flat; NaN is stored as null.
        inputs: What the run read, name → path or Hub id. Part of the fingerprint.
    """
    with _replacing(Path(output_dir), source) as (folder, is_main):
        if hasattr(source, "save_model"):
            source.save_model(str(folder))
        elif is_main and hasattr(source, "save_pretrained"):
            source.save_pretrained(folder)
        elif is_main:
            source(folder)
        if is_main:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml says the same in the open
            if hasattr(source, "state"):
                _write_json(folder / "log_history.json", [_plain_metrics(entry) for entry in source.state.log_history])
            (folder / "recipe.yaml").write_text(_recipe_text(recipe), encoding="utf-8")
            _write_json(folder / "run.json", _describe_run(folder, recipe, inputs))
            _write_json(folder / "metrics.json", _plain_metrics(metrics))
            (folder / "README.md").write_text(model_card(folder, Path(output_dir).as_posix()), encoding="utf-8")
    return Path(output_dir)


def update_metrics(output_dir: str | Path, metrics: Metrics, evaluation: str) -> None:
    """
    Merge what an evaluation measured into a published folder's `metrics.json` and model card. `run.json` notes the
    names of its figures under its own name: those that it made before and no longer makes go, all others stay.

    What `record_evaluation` noted no longer holds of them: a family that is run on measures again.
    """
    folder = Path(output_dir)
    found, run = _plain_metrics(metrics), read_run(folder)
    run.pop("evaluation", None)
    measured = run.get("measured", {})
    stale = measured.get(evaluation, [])
    merged = {key: value for key, value in read_metrics(folder).items() if key not in stale} | found
    others = {name: [key for key in keys if key not in found] for name, keys in measured.items()}
    _write_json(folder / "run.json", run | {"measured": others | {evaluation: sorted(found)}})
    _write_json(folder / "metrics.json", merged)
    write_whole(folder / "README.md", model_card(folder, folder.as_posix()))


def update_generation_config(output_dir: str | Path, changes: Mapping[str, Any]) -> None:
    """
    Set fields of a published checkpoint's `generation_config.json`; `run.json` then lists the new file.

    A file marked as derived from the model's config would lose them when it is loaded, so the mark goes.
    """
    folder = Path(output_dir)
    path, run = folder / "generation_config.json", read_run(folder)
    content = (_read_json(path) if path.is_file() else {}) | {"_from_model_config": False}
    _write_json(path, content | dict(changes))
    run["files"][path.name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    _write_json(folder / "run.json", run)


def read_metrics(output_dir: str | Path) -> dict[str, Any]:
    """The metrics of a published folder.

    Raises:
        UserError: when the folder is not one.
    """
    return _read_json(Path(output_dir) / "metrics.json")


def read_run(output_dir: str | Path) -> dict[str, Any]:
    """The `run.json` of a published folder.

    Raises:
        UserError: when the folder is not one.
    """
    return _read_json(Path(output_dir) / "run.json")


def record_evaluation(output_dir: str | Path, fingerprint: str) -> None:
    """Remember in `run.json` that an evaluation with this fingerprint has been merged into `metrics.json`."""
    _write_json(Path(output_dir) / "run.json", read_run(output_dir) | {"evaluation": fingerprint})


def is_complete(output_dir: str | Path, fingerprint: str) -> bool:
    """Whether `output_dir` holds exactly this run, every file as it was published."""
    folder = Path(output_dir)
    return (folder / "run.json").is_file() and why_stale(folder, {"fingerprint": fingerprint}) is None


def why_stale(output_dir: str | Path, expected: Mapping[str, str]) -> str | None:
    """None when the folder holds the expected run, otherwise what differs, in a few words.

    Args:
        output_dir: A published folder, or not yet one.
        expected: From `run_fingerprint`.
    """
    folder = Path(output_dir)
    if not folder.exists():
        return "not run yet"
    try:
        run = read_run(folder)
        verify_files(folder)
    except UserError as error:
        return str(error)
    if run["fingerprint"] == expected["fingerprint"]:
        return None
    changed = [part for part in ("code", "recipe", "inputs") if run.get(part) != expected.get(part)]
    return f"{' and '.join(changed)} changed since it ran"


def verify_files(output_dir: str | Path) -> None:
    """Refuse a published folder with a missing, truncated or altered file, by name.

    Raises:
        UserError: naming the file and both sizes, or saying that the content differs.
    """
    folder = Path(output_dir)
    for name, entry in read_run(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing, though run.json lists it; the checkpoint is incomplete")
        num_bytes = path.stat().st_size
        if num_bytes != entry["bytes"]:
            raise UserError(f"{path}: {num_bytes} bytes, published with {entry['bytes']}; truncated or overwritten")
        if hash_file(path) != entry["sha256"]:
            raise UserError(f"{path}: the content is not what was published (sha256 differs)")


def trainer_dir(output_dir: str | Path, recipe: Recipe, inputs: Mapping[str, str]) -> Path:
    """Where the Trainer of this run keeps its `checkpoint-N` folders: `<output_dir>.trainer/<fingerprint>`.

    Another recipe, other code or another input is another folder, so a run never resumes from a foreign checkpoint.
    """
    return _unfinished_dir(output_dir, "trainer", recipe, inputs)


def surgery_dir(output_dir: str | Path, recipe: Recipe, inputs: Mapping[str, str]) -> Path:
    """Where a streaming surgery keeps its weights until they are verified: `<output_dir>.surgery/<fingerprint>`.

    What a surgery with another recipe, other code or another input has left there is removed.
    """
    folder = _unfinished_dir(output_dir, "surgery", recipe, inputs)
    for other in folder.parent.glob("*"):
        if other != folder and re.fullmatch("[0-9a-f]{12}", other.name):
            logger.info("discarding %s, which another recipe, code or input left unfinished", other)
            shutil.rmtree(other)
    return folder


def _unfinished_dir(output_dir: str | Path, kind: str, recipe: Recipe, inputs: Mapping[str, str]) -> Path:
    fingerprint = run_fingerprint(recipe.code, recipe.values, inputs)["fingerprint"]
    output_dir = Path(output_dir)
    return output_dir.with_name(f"{output_dir.name}.{kind}") / fingerprint[:12]


@contextmanager
def _replacing(output_dir: Path, source: Any) -> Iterator[tuple[Path, bool]]:
    """Yield a fresh folder beside `output_dir` and whether this is the main process; rename it at the end."""
    accelerator = getattr(source, "accelerator", None)
    wait: Callable[[], None] = accelerator.wait_for_everyone if accelerator else lambda: None
    is_main = accelerator.is_main_process if accelerator else os.environ.get("RANK", "0") == "0"
    if output_dir.is_file():
        raise UserError(f"{output_dir}: output_dir is a file; name a folder")
    aside = output_dir.with_name(f"{output_dir.name}.tmp")
    previous = output_dir.with_name(f"{output_dir.name}.previous")
    if is_main:
        discard(aside)
        aside.mkdir(parents=True)
        (aside / MARK).touch()
    wait()
    yield aside, is_main
    wait()
    if is_main:
        (aside / MARK).unlink()
        discard(previous)
        if output_dir.exists():
            output_dir.rename(previous)
        aside.rename(output_dir)
        discard(previous)
    wait()


def _describe_run(folder: Path, recipe: Recipe, inputs: Mapping[str, str]) -> dict[str, Any]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in DESCRIBING_FILES]
    return {
        **run_fingerprint(recipe.code, recipe.values, inputs),
        "script": Path(recipe.script).name,
        "command": redacted(" ".join(["python", *sys.argv])),
        "recipe_file": recipe.path,
        "input_paths": dict(inputs),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hardware": describe_hardware(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "files": {
            p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": hash_file(p)} for p in files
        },
    }


def describe_hardware() -> str:
    """For instance `2 CPU cores (AMD EPYC 7B13)` or `8 × NVIDIA H200`."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} CPU cores ({names[0] if names else platform.processor() or platform.machine()})"


def _recipe_text(recipe: Recipe) -> str:
    # through JSON: enums and tuples become the plain values YAML can hold
    plain = json.loads(redacted(json.dumps(recipe.resolved, default=str, ensure_ascii=False)))
    command = f"# accelerate launch src/{Path(recipe.script).name} recipe.yaml\n"
    return command + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=119)


def _plain_metrics(metrics: Metrics) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for key, given in metrics.items():
        value: Any = given
        value = value.item() if hasattr(value, "item") else value  # a tensor or numpy number
        if not isinstance(value, (int, float, str, bool, type(None))):
            raise TypeError(f"metrics.json is flat: {key} is a {type(value).__name__}")
        plain[key] = None if isinstance(value, float) and not math.isfinite(value) else value
    return plain


def _write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    write_whole(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {path.parent} is not a finished run of this project") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: needs a JSON object")
    return content


def _git(*arguments: str) -> str | None:
    """The output of a git command in the script's repository; None without git or outside a repository."""
    folder = Path(sys.argv[0]).resolve().parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
