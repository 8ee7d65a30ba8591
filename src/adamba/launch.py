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
    sharded = [name for name in ("FSDP", "DEEPSPEED") if _is_true(environment, f"ACCELERATE_USE_{name}")]
    if "DEEPSPEED" in sharded and importlib.util.find_spec("deepspeed") is None:
        raise UserError("accelerate config: DeepSpeed is not installed; pip install deepspeed, or use ddp.yaml")
    if use_cpu or _is_true(environment, "ACCELERATE_USE_CPU") or environment.get("ACCELERATE_TORCH_DEVICE") == "cpu":
        return
    if local_processes == 1 and not sharded:
        return
    if num_gpus is None:
        import torch

        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_processes > num_gpus:
        works = f"--num_processes {num_gpus}" if num_gpus else "accelerate_configs/cpu.yaml or ddp_cpu.yaml"
        raise UserError(
            f"accelerate config: {local_processes} processes on this machine, which has {num_gpus} GPUs; use {works}"
        )


def _is_true(environment: Mapping[str, str], key: str) -> bool:
    return environment.get(key, "").lower() in TRUE
