"""
What each dimension of each parameter means. Expansion, slicing and permutation are all read off this one table.

An axis is `channel` (residual stream), `query` / `kv` (attention heads x head_dim), `unit` (MLP), `inner`, `ssm_head`,
`mamba_in`, `mamba_conv` (Mamba-2; the last two are concatenations) or `fixed` (never changes).
"""

import re
from dataclasses import dataclass

import torch

from adamba.model.configuration_adamba import ATTENTION_LAYERS, AdambaConfig


@dataclass(frozen=True)
class ParameterRole:
    """Axes of one parameter, and how entries that a surgery adds are filled: see `rules.fresh_tensor`."""

    axes: tuple[str, ...]
    fill: str


READER, WRITER, GAIN, BIAS = "random", "zero", "one", "zero"

# First match wins. A reader of new channels is random, a writer into them zero: so they hold 0 until trained, yet
# gradient reaches every new weight within two steps.
PARAMETER_ROLES: tuple[tuple[str, ParameterRole], ...] = (
    (r"exit_gates\.\d+\.up_proj\.weight$|router\.up_proj\.weight$", ParameterRole(("fixed", "channel"), READER)),
    (r"exit_gates\.\d+\.temperature$", ParameterRole(("fixed",), GAIN)),
    (r"(exit_gates\.\d+|router)\.(up_proj\.bias|down_proj\.(weight|bias))$", ParameterRole(("fixed",), BIAS)),
    (r"embed_tokens\.weight$", ParameterRole(("fixed", "channel"), WRITER)),
    (r"lm_head\.weight$", ParameterRole(("fixed", "channel"), READER)),
    (r"self_attn\.q_proj\.weight$", ParameterRole(("query", "channel"), READER)),
    (r"self_attn\.[kv]_proj\.weight$", ParameterRole(("kv", "channel"), READER)),
    (r"self_attn\.q_proj\.bias$", ParameterRole(("query",), BIAS)),
    (r"self_attn\.[kv]_proj\.bias$", ParameterRole(("kv",), BIAS)),
    (r"self_attn\.o_proj\.weight$", ParameterRole(("channel", "query"), WRITER)),
    (r"self_attn\.[qk]_norm\.weight$", ParameterRole(("fixed",), GAIN)),
    (r"mlp\.(gate|up)_proj\.weight$", ParameterRole(("unit", "channel"), READER)),
    (r"mlp\.(gate|up)_proj\.bias$", ParameterRole(("unit",), BIAS)),
    (r"mlp\.down_proj\.weight$", ParameterRole(("channel", "unit"), WRITER)),
    (r"(o_proj|down_proj)\.bias$", ParameterRole(("channel",), BIAS)),
    (r"mixer\.in_proj\.weight$", ParameterRole(("mamba_in", "channel"), READER)),
    (r"mixer\.conv1d\.weight$", ParameterRole(("mamba_conv", "fixed", "fixed"), READER)),
    (r"mixer\.conv1d\.bias$", ParameterRole(("mamba_conv",), BIAS)),
    (r"mixer\.A_log$", ParameterRole(("ssm_head",), "decay")),
    (r"mixer\.dt_bias$", ParameterRole(("ssm_head",), "time_step")),
    (r"mixer\.D$", ParameterRole(("ssm_head",), GAIN)),
    (r"mixer\.norm\.weight$", ParameterRole(("inner",), GAIN)),
    (r"mixer\.out_proj\.weight$", ParameterRole(("channel", "inner"), WRITER)),
    (r"norm\.weight$", ParameterRole(("channel",), GAIN)),
)


def role_of(name: str) -> ParameterRole:
    """The role of a parameter by its name in `AdambaForCausalLM.state_dict()`."""
    for pattern, role in PARAMETER_ROLES:
        if re.search(pattern, name):
            return role
    raise ValueError(f"surgery: parameter {name!r} is not known; add it to PARAMETER_ROLES")


def layer_of(name: str) -> int | None:
    """Index of the layer that a parameter belongs to, or `None`."""
    match = re.search(r"\blayers\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def layer_width(config: AdambaConfig, layer: int | None) -> int:
    """Residual channels that a layer reads: an attention layer's own width, `hidden_size` elsewhere."""
    if layer is None or config.layer_types[layer] not in ATTENTION_LAYERS:
        return config.hidden_size
    attention_index = sum(kind in ATTENTION_LAYERS for kind in config.layer_types[:layer])
    return config.attention_widths[attention_index]


def axis_sections(axis: str, config: AdambaConfig, width: int) -> list[int]:
    """Sizes of the consecutive parts of an axis; each part grows or shrinks at its own end."""
    num_heads, num_kv_heads = config.heads_at(width)
    inner, heads = config.mamba_inner_size, config.mamba_num_heads
    group_states = config.mamba_num_groups * config.mamba_state_size
    return {
        "channel": [width],
        "query": [num_heads * config.head_dim],
        "kv": [num_kv_heads * config.head_dim],
        "unit": [config.units_at(width)],
        "inner": [inner],
        "ssm_head": [heads],
        "mamba_in": [inner, inner, group_states, group_states, heads],
        "mamba_conv": [inner, group_states, group_states],
    }[axis]


def shared_slices(axis: str, small: AdambaConfig, large: AdambaConfig, layer: int | None) -> list[tuple[slice, slice]]:
    """Where the smaller model's axis sits in the larger model's: each section's place in (the smaller, the larger)."""
    small_sections = axis_sections(axis, small, layer_width(small, layer))
    large_sections = axis_sections(axis, large, layer_width(large, layer))
    pairs, small_offset, large_offset = [], 0, 0
    for small_size, large_size in zip(small_sections, large_sections, strict=True):
        here = slice(small_offset, small_offset + small_size)
        pairs.append((here, slice(large_offset, large_offset + small_size)))
        small_offset += small_size
        large_offset += large_size
    return pairs


def shared_blocks(
    name: str, shape: list[int], small: AdambaConfig, large: AdambaConfig, into: AdambaConfig
) -> tuple[list[int], list[list[tuple[slice, slice]]]]:
    """
    A parameter of this shape in the model `into`, which is one of the two: its shape there, and for each dimension the
    places, (in the smaller model, in the larger one), of what both have.
    """
    role, layer = role_of(name), layer_of(name)
    shape = list(shape)
    blocks: list[list[tuple[slice, slice]]] = []
    if role.axes == ("fixed",):  # of any number of dimensions
        return shape, blocks
    for dim, axis in enumerate(role.axes):
        if axis == "fixed":
            blocks.append([(slice(0, shape[dim]), slice(0, shape[dim]))])
        else:
            shape[dim] = sum(axis_sections(axis, into, layer_width(into, layer)))
            blocks.append(shared_slices(axis, small, large, layer))
    return shape, blocks


def shared_index(axis: str, small: AdambaConfig, large: AdambaConfig, layer: int | None) -> torch.Tensor:
    """The index in the larger model's axis of each entry of the smaller model's."""
    return torch.cat([torch.arange(part.start, part.stop) for _, part in shared_slices(axis, small, large, layer)])
