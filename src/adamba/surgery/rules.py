"""
A surgery is one rule for each tensor of the new model. The same rule runs in memory (`apply`) and, tensor by tensor,
from disk to disk (`streaming`), so both give the same bits.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.model.mamba_adamba import init_decay, init_time_steps

from .draws import fill_random
from .memory import empty


@dataclass(frozen=True)
class Surgery:
    """
    What a change of shape does.

    Attributes:
        config: of the model after it.
        tensor: (name, shape, the old model's tensors by name) -> that tensor of the new model.
        layers: pairs of layers, (old, new), after which both models must hold the same residual stream.
    """

    config: AdambaConfig
    tensor: Callable[[str, torch.Size, Mapping[str, torch.Tensor]], torch.Tensor]
    layers: list[tuple[int, int]]


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without weights (they are on the meta device); what is in no checkpoint, rotary tables, is real."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # which the context parted
    return model


@torch.no_grad()
def apply(surgery: Surgery, model: PreTrainedModel) -> AdambaForCausalLM:
    """The model after the surgery, in memory; `model` stays as it was."""
    old = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    new = empty_model(copy.deepcopy(surgery.config))
    shapes = {name: tensor.shape for name, tensor in new.state_dict().items()}
    # a copy, as some rules hand on the old tensor itself
    made = {name: surgery.tensor(name, shape, old).to(model.dtype, copy=True) for name, shape in shapes.items()}
    new.load_state_dict(made, assign=True)
    new.tie_weights()
    new.config._attn_implementation = model.config._attn_implementation
    carry_generation_config(model, new)
    return new.to(model.device).train(model.training)


def carry_generation_config(old: PreTrainedModel, new: PreTrainedModel) -> None:
    """
    Copy the generation config. Marked as derived, a saved one would lose `width` and the like when it is loaded. A
    slice loses a `width` that was chosen for the whole: it runs at its own, and may not have the other.
    """
    if old.can_generate():
        new.generation_config = copy.deepcopy(old.generation_config)
        new.generation_config._from_model_config = False
        chosen = getattr(new.generation_config, "width", None)
        if chosen not in (None, "auto") and min(new.config.attention_widths) < new.config.hidden_size:
            new.generation_config.width = None


def seed_for(name: str, seed: int) -> int:
    """The seed of one tensor's random numbers: the same in whatever order, and wherever, the tensors are made."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def fresh_tensor(fill: str, shape: torch.Size | list[int], std: float, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Values for entries that the old model did not have: `axes.PARAMETER_ROLES` names the fill of each parameter."""
    if fill == "decay":
        return init_decay(torch.empty(shape)).to(dtype)
    if fill == "time_step":
        return init_time_steps(torch.empty(shape), torch.Generator().manual_seed(seed)).to(dtype)
    return fill_fresh(empty(shape, dtype), fill, std, seed)


def fill_fresh(new: torch.Tensor, fill: str, std: float, seed: int) -> torch.Tensor:
    """`fresh_tensor` of the fills that look the same everywhere, in a part of a tensor."""
    if fill == "random":
        return fill_random(new, std, seed)
    return new.fill_(1 if fill == "one" else 0)
