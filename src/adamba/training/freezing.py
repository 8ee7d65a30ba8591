"""What a phase trains, and nothing else."""

import re

from torch import nn

from adamba.errors import UserError
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.training.elastic import ElasticArguments, by_level
from adamba.training.sharding import num_weights

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
        learning += num_weights(parameter) * parameter.requires_grad
    if not learning:
        raise UserError(f"train_only: {part!r} matches no parameter of this {type(model).__name__}")
    return learning


def freeze_idle(model: nn.Module, elastic: ElasticArguments | None = None) -> None:
    """
    No gradient for exit gates and router where no loss of this run reaches them: data parallelism would wait for their
    gradients, and weight decay would undo what they learned before.
    """
    if not isinstance(model, AdambaForCausalLM):
        return
    on = elastic is not None and elastic.elastic
    if not (on and elastic.num_sampled_exits and elastic.gate_loss_weight):
        model.model.exit_gates.requires_grad_(False)
    if not (on and elastic.distill and elastic.router_loss_weight and _trains_below_full(model.config, elastic)):
        model.model.router.requires_grad_(False)


def _trains_below_full(config: AdambaConfig, elastic: ElasticArguments) -> bool:
    """Whether a width is drawn beside the full one."""
    every = float(elastic.width_weights is None)
    return any(by_level(config, "width_weights", elastic.width_weights, otherwise=every)[:-1])
