"""Wider, and the same function at every width: the old block stays in the top-left corner of every matrix."""

import itertools
from collections.abc import Mapping

import torch

from adamba.model import AdambaConfig, AdambaForCausalLM

from .axes import axis_sections, layer_of, layer_width, role_of, shared_slices
from .memory import converted
from .rules import Surgery, apply, fresh_tensor, generator_for

# What grows and shrinks with the hidden size, always by the same ratio.
COUNTS = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "mamba_num_groups")


def expanded_config(
    config: AdambaConfig, hidden_size: int, width_levels: dict[str, int] | None = None
) -> AdambaConfig:
    """
    The configuration after `expand_width`. Every count that goes with the width grows by the same ratio; `head_dim`,
    the query/key-value ratio, the Mamba group size and `norm_base_width` stay.

    Raises:
        ValueError: a hidden size that is not wider, or at which some count is not whole.
    """
    if hidden_size <= config.hidden_size:
        raise ValueError(f"hidden_size: {hidden_size} must be above the present {config.hidden_size}")
    if any(width != config.hidden_size for width in config.attention_widths):
        raise ValueError("expand: this checkpoint was sliced; expand the elastic one that it came from")
    grown = {}
    for key in COUNTS:
        grown[key], rest = divmod(getattr(config, key) * hidden_size, config.hidden_size)
        if rest:
            step = config.hidden_size // _common_divisor(config)
            raise ValueError(
                f"hidden_size: {hidden_size} would need {getattr(config, key) * hidden_size / config.hidden_size:.2f} "
                f"{key}; use a multiple of {step}"
            )
    values = {**config.to_dict(), **grown, "hidden_size": hidden_size}
    values["attention_widths"] = [hidden_size] * config.num_attention_layers
    if width_levels is None:
        *smaller, widest = config.width_levels
        width_levels = {name: config.width_levels[name] for name in smaller} | {widest: hidden_size}
    values["width_levels"] = dict(width_levels)
    values["expanded_from"] = config.hidden_size
    return AdambaConfig.from_dict(values)


def config_before_expansion(config: AdambaConfig) -> AdambaConfig | None:
    """The sizes that `expanded_config` started from; `None` if the model was never expanded."""
    if config.expanded_from is None:
        return None
    values = {key: getattr(config, key) * config.expanded_from // config.hidden_size for key in COUNTS}
    values |= {"hidden_size": config.expanded_from, "expanded_from": None, "width_levels": None}
    values["attention_widths"] = [config.expanded_from] * config.num_attention_layers
    return AdambaConfig.from_dict({**config.to_dict(), **values})


def _common_divisor(config: AdambaConfig) -> int:
    divisor = config.hidden_size
    while any(getattr(config, key) % divisor for key in COUNTS) or config.hidden_size % divisor:
        divisor -= 1
    return divisor


def expand_tensor(name: str, old: torch.Tensor, config: AdambaConfig, wide: AdambaConfig, seed: int) -> torch.Tensor:
    """
    One parameter of the wider model, from the same parameter of the narrower one. Random readers take the spread of
    the trained weights, so that new features start at the scale of the old ones.
    """
    role, layer = role_of(name), layer_of(name)
    if role.axes == ("fixed",):
        return old.clone()
    shape, blocks = list(old.shape), []
    for dim, axis in enumerate(role.axes):
        if axis == "fixed":
            blocks.append([(slice(None), slice(None))])
        else:
            shape[dim] = sum(axis_sections(axis, wide, layer_width(wide, layer)))
            blocks.append(shared_slices(axis, config, wide, layer))
    fill = "zero" if name.endswith("lm_head.weight") and wide.tie_word_embeddings else role.fill
    std = 0.0
    if fill == "random":
        wider = torch.promote_types(old.dtype, torch.float32)
        norm = torch.linalg.vector_norm(converted(old, wider))  # as with `dtype=wider`, in half the time
        std = max(float(norm) / old.numel() ** 0.5, 1e-4)
    new = fresh_tensor(fill, shape, std, old.dtype, generator_for(name, seed))
    for block in itertools.product(*blocks):
        new[tuple(large for _, large in block)] = old[tuple(small for small, _ in block)]
    return new


def expansion(
    config: AdambaConfig, hidden_size: int, width_levels: dict[str, int] | None = None, seed: int = 0
) -> Surgery:
    """The surgery of `expand_width`."""
    wide = expanded_config(config, hidden_size, width_levels)

    def tensor(name: str, shape: torch.Size, old: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tensor = old[name]
        new = expand_tensor(name, tensor, config, wide, seed)
        if new.shape != shape:  # only the router's levels may differ in number: its last layer starts anew
            new = fresh_tensor(role_of(name).fill, shape, 0.0, tensor.dtype, generator_for(name, seed))
        return new

    return Surgery(wide, tensor, [(layer, layer) for layer in range(config.num_hidden_layers)])


def expand_width(
    model: AdambaForCausalLM, hidden_size: int, width_levels: dict[str, int] | None = None, seed: int = 0
) -> AdambaForCausalLM:
    """
    A model of `hidden_size` channels that computes what `model` computes, at every width that `model` has.

    Args:
        width_levels: the levels of the wider model. Default: the old ones, the widest moved to `hidden_size`.
        seed: of the random readers.

    Raises:
        ValueError: see `expanded_config`.
    """
    return apply(expansion(model.config, hidden_size, width_levels, seed), model)
