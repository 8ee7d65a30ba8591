"""Where DeepSpeed and FSDP split a model over processes: counting, saving it whole, and resuming only what fits."""

import io
import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer

from adamba.errors import UserError


def num_weights(parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds over all processes; ZeRO-3 leaves an empty tensor in its place."""
    return getattr(parameter, "ds_numel", parameter.numel())


def count_weights(model: nn.Module, only_trainable: bool = False) -> int:
    """`model.num_parameters()`, also where the parameters are elsewhere."""
    return sum(num_weights(p) for p in model.parameters() if p.requires_grad or not only_trainable)


def is_sharded(trainer: Trainer) -> bool:
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def save_whole(trainer: Trainer) -> None:
    """
    From now on this Trainer writes the same files however its model is spread. Left to itself, ZeRO-1 and ZeRO-2
    write a tied head beside the embedding; DeepSpeed's engine names weights as before adapters were merged; and FSDP2,
    which makes a class of its own, puts torch's source files in place of the model's and its class into config.json.
    """
    write = trainer._save

    def save(output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if state_dict and isinstance(model, PreTrainedModel):
            state_dict = {name.removeprefix("base_model.model."): tensor for name, tensor in state_dict.items()}
            tied = {name for name, source in model.all_tied_weights_keys.items() if source in state_dict}
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        with _own_class(model):
            write(output_dir, state_dict)

    trainer._save = save


def copy_model(trainer: Trainer, checkpoint: str, folder: str) -> None:
    """
    What `trainer.save_model` wrote into a checkpoint, without what the Trainer added. Its config says that caches are
    off, as the Trainer trains; here what the model's own says now.
    """
    if not trainer.is_world_process_zero():
        return
    for pattern in ("*config.json", "*.safetensors", "*.safetensors.index.json", "*_adamba.py"):
        for path in Path(checkpoint).glob(pattern):
            shutil.copy2(path, folder)
    config = Path(folder) / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) | {"use_cache": trainer.model.config.use_cache}
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _own_class(model: nn.Module) -> Iterator[None]:
    """The model as the class that it was before `fully_shard`."""
    sharded = type(model)
    model.__class__ = next(kind for kind in sharded.__mro__ if not issubclass(kind, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded


def saved_by(checkpoint: Path) -> tuple[str, int | None]:
    """
    How the state of a `checkpoint-N` was spread when it was saved, and for DeepSpeed over how many processes:
    `("DeepSpeed ZeRO-3", 2)`, `("DeepSpeed ZeRO-1 or 2", 2)`, `("FSDP", None)`, `("no sharding", None)`.
    """
    ranks = {
        int(found[1])
        for path in checkpoint.glob("global_step*/*_optim_states.pt")
        if (found := re.search(r"zero_pp_rank_(\d+)_", path.name))
    }
    if ranks:
        whole = any(checkpoint.glob("global_step*/mp_rank_*_model_states.pt"))
        return _zero(2 if whole else 3), len(ranks)
    return ("FSDP" if any(checkpoint.glob("pytorch_model_fsdp*")) else "no sharding"), None


def _zero(stage: int) -> str:
    return f"DeepSpeed ZeRO-{'3' if stage == 3 else '1 or 2'}"


@contextmanager
def readable_checkpoint(trainer: Trainer, checkpoint: str) -> Iterator[str]:
    """
    A checkpoint as this launch can read it: itself, or for DeepSpeed on another number of processes a copy whose
    optimizer state is not split (DeepSpeed's universal form), for as long as it is needed.

    Raises:
        UserError: saved under another sharding; its optimizer state would be left out in silence, or a library stop.
    """
    kind, num_processes = saved_by(Path(checkpoint))
    here = "no sharding"
    if trainer.is_deepspeed_enabled:
        here = _zero(trainer.accelerator.state.deepspeed_plugin.zero_stage)
    elif trainer.is_fsdp_enabled:
        here = "FSDP"
    if kind != here:
        raise UserError(
            f"resume_from_checkpoint: {checkpoint} was saved under {kind}, this launch has {here}; take the "
            f"accelerate config that it was saved under, or begin from its weights in another output_dir: "
            f"--model_name_or_path {checkpoint}"
        )
    if num_processes in (None, trainer.args.world_size):
        yield checkpoint
        return
    copy = Path(trainer.args.output_dir) / f"from_{num_processes}_processes"
    if trainer.is_world_process_zero():
        shutil.rmtree(copy, ignore_errors=True)
        _make_universal(Path(checkpoint), copy)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.state.deepspeed_plugin.deepspeed_config["checkpoint"] = {"load_universal": True}
    try:
        yield str(copy)
    finally:
        if trainer.is_world_process_zero():
            shutil.rmtree(copy, ignore_errors=True)


def _make_universal(checkpoint: Path, copy: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main as convert

    (shards,) = checkpoint.glob("global_step*")
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("global_step*", "latest"))
    workers = min(os.cpu_count() or 1, 8) if sum(path.stat().st_size for path in shards.iterdir()) > 2**30 else 1
    options = {"num_extract_workers": workers, "num_merge_workers": workers, "keep_temp_folder": False}
    options |= {"strict": True, "inject_missing_state": True}
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # a line and a bar for each step
        convert(Namespace(input_folder=str(shards), output_folder=str(copy / shards.name), **options))
    (copy / "latest_universal").write_text(shards.name)
