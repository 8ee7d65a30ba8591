"""Any width of an elastic model as a checkpoint of its own: fewer weights, the same logits."""

import copy

import torch

from adamba.model import AdambaConfig, AdambaForCausalLM

from .axes import layer_of, role_of, shared_index


def sliced_config(config: AdambaConfig, width) -> AdambaConfig:
    """The configuration at `width` (level name, channels, or one per attention layer). Residual stream, Mamba layers
    and head keep their size: they run at full width in the elastic model too."""
    return AdambaConfig.from_dict({**config.to_dict(), "attention_widths": config.resolve_width(width)})


def slice_tensor(name: str, old: torch.Tensor, config: AdambaConfig, small: AdambaConfig) -> torch.Tensor:
    """One parameter of the sliced model."""
    role, layer = role_of(name), layer_of(name)
    if role.axes == ("fixed",):
        return old.clone()
    for dim, axis in enumerate(role.axes):
        if axis != "fixed":
            index = shared_index(axis, small, config, layer)
            if len(index) != old.shape[dim]:
                old = old.index_select(dim, index.to(old.device))
    return old.clone()


@torch.no_grad()
def slice_width(model: AdambaForCausalLM, width) -> AdambaForCausalLM:
    """
    A standalone model whose logits are those of `model` at `width`, with only the weights that it needs.

    Raises:
        ValueError: a width that `model` cannot run.
    """
    config = sliced_config(model.config, width)
    small = AdambaForCausalLM(config).to(model.dtype)
    small.load_state_dict(
        {name: slice_tensor(name, old, model.config, config) for name, old in model.state_dict().items()}
    )
    small.config._attn_implementation = model.config._attn_implementation
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.to(model.device).train(model.training)
