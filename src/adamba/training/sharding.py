"""Where DeepSpeed and FSDP split a model over processes: counting, saving it whole, and resuming only what fits."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
    write a tied head beside the embedding, and FSDP2, which makes a class of its own, puts torch's source files in
    place of the model's and its class into config.json.
    """
    write = trainer._save

    def save(output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if state_dict and isinstance(model, PreTrainedModel):
            tied = {name for name, source in model.all_tied_weights_keys.items() if source in state_dict}
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        with _own_class(model):
            write(output_dir, state_dict)

    trainer._save = save


def copy_model(trainer: Trainer, checkpoint: str, folder: str) -> None:
    """What `trainer.save_model` wrote into a checkpoint, without what the Trainer added."""
    if not trainer.is_world_process_zero():
        return
    for pattern in ("*config.json", "*.safetensors", "*.safetensors.index.json", "*_adamba.py"):
        for path in Path(checkpoint).glob(pattern):
            shutil.copy2(path, folder)


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
    How the state of a `checkpoint-N` was spread when it was saved, and over how many processes where it can only be
    read by as many: `("DeepSpeed ZeRO-3", 2)`, `("DeepSpeed ZeRO-1 or 2", 2)`, `("FSDP", None)`, `("", None)`.
    """
    ranks = {
        int(found[1])
        for path in checkpoint.glob("global_step*/*_optim_states.pt")
        if (found := re.search(r"zero_pp_rank_(\d+)_", path.name))
    }
    if any(checkpoint.glob("global_step*")):
        whole = any(checkpoint.glob("global_step*/mp_rank_*_model_states.pt"))
        return f"DeepSpeed ZeRO-{'1 or 2' if whole else '3'}", len(ranks)
    return ("FSDP" if any(checkpoint.glob("pytorch_model_fsdp*")) else ""), None


def refuse_other_sharding(trainer: Trainer, checkpoint: str) -> None:
    """
    Refuse a checkpoint that this launch cannot read whole: its optimizer state would be left out in silence, or a
    library would stop with a traceback.

    Raises:
        UserError: naming the folder, how it was saved, and what works.
    """
    kind, num_processes = saved_by(Path(checkpoint))
    here = ""
    if trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        here = f"DeepSpeed ZeRO-{'3' if stage == 3 else '1 or 2'}"
    elif trainer.is_fsdp_enabled:
        here = "FSDP"
    if kind == here and num_processes in (None, trainer.args.world_size):
        return
    there = f"{kind} on {num_processes} processes" if num_processes else kind or "unsharded training"
    now = f"{here} on {trainer.args.world_size}" if num_processes and here else here or "unsharded training"
    raise UserError(
        f"resume_from_checkpoint: {checkpoint} is of {there}, this launch is {now}; resume it as it was launched, or "
        f"start a run from its weights: --model_name_or_path {checkpoint}, and another output_dir"
    )
