"""Wider, and the same function at every width: the old block stays in the top-left corner of every matrix."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from adamba.model import AdambaConfig, AdambaForCausalLM

from .axes import role_of, shared_blocks
from .memory import empty
from .rules import Surgery, apply, fill_fresh, fresh_tensor, seed_for

PIECE = 2**17  # numbers squared at once: they stay in the cache
SAMPLED = 2**20
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
    fill = role_of(name).fill
    shape, blocks = shared_blocks(name, list(old.shape), config, wide, into=wide)
    if shape == list(old.shape):
        return old
    if name.endswith("lm_head.weight") and wide.tie_word_embeddings:
        fill = "zero"
    if fill in ("decay", "time_step"):
        new = fresh_tensor(fill, shape, 0.0, old.dtype, seed_for(name, seed))
    else:
        std = max(root_mean_square(old), 1e-4) if fill == "random" else 0.0
        new = empty(shape, old.dtype)
        for index, part in enumerate(_new_parts(shape, [[large for _, large in places] for places in blocks])):
            fill_fresh(new[part], fill, std, seed_for(f"{name}/{index}", seed))
    for block in itertools.product(*blocks):
        new[tuple(large for _, large in block)] = old[tuple(small for small, _ in block)]
    return new


def _new_parts(shape: Sequence[int], old: Sequence[Sequence[slice]]) -> Iterator[tuple[slice, ...]]:
    """The parts of a tensor of this shape that are in none of the old blocks, whose places are given by dimension."""
    if not shape:
        return
    ends = [0, *(place.stop for place in old[0])]
    starts = [*(place.start for place in old[0]), shape[0]]
    for end, start in zip(ends, starts, strict=True):
        if end < start:
            yield (slice(end, start),)
    for place in old[0]:
        for part in _new_parts(shape[1:], old[1:]):
            yield (place, *part)


def root_mean_square(tensor: torch.Tensor) -> float:
    """
    Of evenly spaced entries, about a million (of all where there are fewer): its last digits are no matter of a
    spread. Piece by piece, in fp32 or wider, and by numpy: torch's sums depend on the number of its threads.
    """
    entries = tensor.reshape(-1)[:: tensor.numel() // SAMPLED | 1]  # odd, so that it meets every column
    total = 0.0
    for piece in entries.split(PIECE):
        wide = piece.to(torch.promote_types(piece.dtype, torch.float32)).numpy()
        total += float(np.square(wide).sum())
    return (total / entries.numel()) ** 0.5


def expansion(
    config: AdambaConfig, hidden_size: int, width_levels: dict[str, int] | None = None, seed: int = 0
) -> Surgery:
    """The surgery of `expand_width`."""
    wide = expanded_config(config, hidden_size, width_levels)

    def tensor(name: str, shape: torch.Size, old: Mapping[str, torch.Tensor]) -> torch.Tensor:
        new = expand_tensor(name, old[name], config, wide, seed)
        if new.shape != shape:  # only the router's levels may differ in number: its last layer starts anew
            new = fresh_tensor(role_of(name).fill, shape, 0.0, new.dtype, seed_for(name, seed))
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
