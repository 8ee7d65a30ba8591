"""Does the way a script was launched fit this machine? Asked before anything touches a device."""

import importlib.util
import os
from collections.abc import Mapping

from adamba.errors import UserError

TRUE = ("1", "true", "yes")


def check_launch(
    environment: Mapping[str, str] = os.environ, num_gpus: int | None = None, use_cpu: bool = False
) -> None:
    """
    Refuse an accelerate config that asks for more than this machine has.

    Args:
        environment: What the launcher set.
        num_gpus: Visible GPUs; counted if not given.
        use_cpu: The recipe's key; then GPUs do not matter.

    Raises:
        UserError: more processes than GPUs, sharding without a GPU, DeepSpeed that is not there.
    """
    local_processes = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    sharded = [name for name in ("FSDP", "DEEPSPEED") if is_true(f"ACCELERATE_USE_{name}", environment)]
    if "DEEPSPEED" in sharded and importlib.util.find_spec("deepspeed") is None:
        raise UserError("accelerate config: DeepSpeed is not installed; pip install deepspeed, or use ddp.yaml")
    if use_cpu or is_true("ACCELERATE_USE_CPU", environment) or environment.get("ACCELERATE_TORCH_DEVICE") == "cpu":
        return
    if local_processes == 1 and not sharded:
        return
    if num_gpus is None:
        import torch

        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_processes > num_gpus:
        on_cpu = "accelerate_configs/cpu.yaml, or ddp_cpu.yaml with --use_cpu true"
        works = f"--num_processes {num_gpus}" if num_gpus else on_cpu
        raise UserError(
            f"accelerate config: {local_processes} processes on this machine, which has {num_gpus} GPUs; use {works}"
        )


def check_precision(bf16: bool, fp16: bool, environment: Mapping[str, str] = os.environ) -> None:
    """
    Refuse a recipe that says another precision than the accelerate config. accelerate's would win in silence where the
    recipe wants none, and DeepSpeed would stop once the model is loaded.

    Raises:
        UserError: naming both.
    """
    theirs, ours = environment.get("ACCELERATE_MIXED_PRECISION", ""), "bf16" if bf16 else "fp16" if fp16 else "no"
    if theirs in ("", ours) or (ours != "no" and not is_true("ACCELERATE_USE_DEEPSPEED", environment)):
        return
    recipe = f"--{theirs} true, or " if theirs in ("bf16", "fp16") else ""
    raise UserError(
        f"accelerate config: mixed_precision is {theirs}, the recipe's is {ours}; give {recipe}"
        f"accelerate launch --mixed_precision {ours}"
    )


def is_true(key: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher switched something on, for instance `ACCELERATE_USE_FSDP`."""
    return environment.get(key, "").lower() in TRUE
