"""What a phase trains, and nothing else."""

import re

from torch import nn

from adamba.errors import UserError

# Recipe value of `train_only` -> names of the parameters that learn.
PARTS = {
    "all": r".",
    "mamba": r"\.layers\.\d+\.(norm|mixer)\.",
    "gates": r"\.(exit_gates|router)\.",
    "router": r"\.router\.",
    "mamba_and_gates": r"\.layers\.\d+\.(norm|mixer)\.|\.(exit_gates|router)\.",
}


def freeze_all_but(model: nn.Module, part: str) -> int:
    """
    Leave gradients to the named part only; returns how many parameters (numbers) learn.

    Raises:
        UserError: an unknown part, or one that this model does not have.
    """
    if part not in PARTS:
        raise UserError(f"train_only: {part!r} is unknown; use {', '.join(PARTS)}")
    learning = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(PARTS[part], name) is not None)
        learning += parameter.numel() * parameter.requires_grad
    if not learning:
        raise UserError(f"train_only: {part!r} matches no parameter of this {type(model).__name__}")
    return learning
