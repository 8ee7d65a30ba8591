"""Order channels, heads and MLP units by importance, so that prefixes are the best sub-networks. Exact."""

from collections.abc import Callable, Iterable

import torch

from adamba.model import AdambaForCausalLM

from .axes import layer_of, layer_width, role_of


class ImportanceMeter:
    """
    Mean activation sizes on calibration batches (Minitron, Muralidharan et al., 2024): |normed channel| summed over
    layers; for a head or an MLP unit, its |activation| times the norm of the column through which it writes.
    """

    def __init__(self, model: AdambaForCausalLM):
        self.channel = torch.zeros(model.config.hidden_size)
        self.heads: dict[int, torch.Tensor] = {}
        self.units: dict[int, torch.Tensor] = {}
        self.hooks = []
        for index, layer in enumerate(model.model.layers):
            if hasattr(layer, "self_attn"):
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    self.hooks.append(norm.register_forward_hook(self._see_channels))
                self.hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(self._seer(self.heads, index)))
                self.hooks.append(layer.mlp.down_proj.register_forward_pre_hook(self._seer(self.units, index)))

    def _see_channels(self, module, args, output: torch.Tensor) -> None:
        seen = output.float().abs().flatten(0, -2).mean(0).cpu()
        self.channel[: len(seen)] += seen

    @staticmethod
    def _seer(store: dict[int, torch.Tensor], index: int):
        def see(module, args) -> None:
            size = args[0].float().abs().flatten(0, -2).mean(0) * module.weight.float().norm(dim=0)
            store[index] = store.get(index, 0) + size.cpu()

        return see

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


Order = dict[tuple[str, int | None], torch.Tensor]


@torch.no_grad()
def importance_order(model: AdambaForCausalLM, batches: Iterable[torch.Tensor]) -> Order:
    """
    (axis, layer) -> indices, most important first. `batches`: input ids (B, L). Heads move as whole key/value groups
    with their query heads.
    """
    meter = ImportanceMeter(model)
    try:
        for input_ids in batches:
            model(input_ids=input_ids.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        meter.remove()
    config = model.config
    order: Order = {("channel", None): meter.channel.argsort(descending=True)}
    for layer, heads in meter.heads.items():
        _, num_kv_heads = config.heads_at(layer_width(config, layer))
        groups = heads.view(num_kv_heads, -1).sum(1).argsort(descending=True)
        for axis, size in (("query", len(heads)), ("kv", num_kv_heads * config.head_dim)):
            order[axis, layer] = torch.arange(size).view(num_kv_heads, -1)[groups].flatten()
        order["unit", layer] = meter.units[layer].argsort(descending=True)
    return order


@torch.no_grad()
def sort_by_importance(
    model: AdambaForCausalLM, batches: Iterable[torch.Tensor], agree: Callable[[Order], Order] = lambda order: order
) -> AdambaForCausalLM:
    """
    Reorder `model` in place and return it. Its function at full width stays; its sub-widths become its best parts.

    Args:
        agree: one process's order -> that of all.

    Raises:
        ValueError: a sliced checkpoint (its layers no longer share one order), or no batch.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("sort_by_importance: no calibration batch was given")
    if any(width != model.config.hidden_size for width in model.config.attention_widths):
        raise ValueError("sort_by_importance: this checkpoint was sliced; sort the elastic one that it came from")
    order = agree(importance_order(model, batches))
    for name, tensor in model.named_parameters():  # a tied head is listed once
        role, layer = role_of(name), layer_of(name)
        for dim, axis in enumerate(role.axes):
            index = order.get((axis, None if axis == "channel" else layer))
            if index is not None:
                tensor.copy_(tensor.index_select(dim, index.to(tensor.device)))
    return model
