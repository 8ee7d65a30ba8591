"""Any width of an elastic model as a checkpoint of its own: fewer weights, the same logits."""

import itertools
from collections.abc import Mapping

import torch

from adamba.model import AdambaConfig, AdambaForCausalLM

from .axes import shared_blocks
from .memory import empty
from .rules import Surgery, apply


def sliced_config(config: AdambaConfig, width) -> AdambaConfig:
    """The configuration at `width` (level name, channels, or one per attention layer). Residual stream, Mamba layers
    and head keep their size: they run at full width in the elastic model too."""
    return AdambaConfig.from_dict({**config.to_dict(), "attention_widths": config.resolve_width(width)})


def slice_tensor(name: str, old: torch.Tensor, config: AdambaConfig, small: AdambaConfig) -> torch.Tensor:
    """One parameter of the sliced model; `old` itself if the slice leaves it whole."""
    shape, blocks = shared_blocks(name, list(old.shape), small, config, into=small)
    if shape == list(old.shape):
        return old
    new = empty(shape, old.dtype)
    for block in itertools.product(*blocks):
        new[tuple(here for here, _ in block)] = old[tuple(there for _, there in block)]
    return new


def slicing(config: AdambaConfig, width) -> Surgery:
    """The surgery of `slice_width`."""
    small = sliced_config(config, width)

    def tensor(name: str, shape: torch.Size, old: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return slice_tensor(name, old[name], config, small)

    return Surgery(small, tensor, [(layer, layer) for layer in range(config.num_hidden_layers)])


def slice_width(model: AdambaForCausalLM, width) -> AdambaForCausalLM:
    """
    A standalone model whose logits are those of `model` at `width`, with only the weights that it needs.

    Raises:
        ValueError: a width that `model` cannot run.
    """
    return apply(slicing(model.config, width), model)
