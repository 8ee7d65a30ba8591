"""Wider, and the same function at every width: the old block stays in the top-left corner of every matrix."""

import copy

import torch

from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.model.mamba_adamba import init_decay, init_time_steps

from .axes import axis_sections, layer_of, layer_width, role_of, shared_index

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


def expand_tensor(
    name: str, old: torch.Tensor, config: AdambaConfig, wide: AdambaConfig, generator: torch.Generator
) -> torch.Tensor:
    """One parameter of the wider model, from the same parameter of the narrower one."""
    role, layer = role_of(name), layer_of(name)
    if role.axes == ("fixed",):
        return old.clone()
    shape = list(old.shape)
    for dim, axis in enumerate(role.axes):
        if axis != "fixed":
            shape[dim] = sum(axis_sections(axis, wide, layer_width(wide, layer)))
    fill = "zero" if name.endswith("lm_head.weight") and wide.tie_word_embeddings else role.fill
    new = fresh_tensor(fill, shape, old, generator)
    index = [
        torch.arange(size) if axis == "fixed" else shared_index(axis, config, wide, layer)
        for axis, size in zip(role.axes, old.shape, strict=True)
    ]
    new[torch.meshgrid(*index, indexing="ij")] = old
    return new


def fresh_tensor(fill: str, shape: list[int], like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Values for entries that the narrower model did not have. Random readers take the spread of the trained weights, so
    that new features start at the scale of the old ones.
    """
    new = torch.zeros(shape, dtype=torch.float32)
    if fill == "random":
        new.normal_(0.0, max(float(like.float().std()), 1e-4), generator=generator)
    elif fill == "one":
        new.fill_(1.0)
    elif fill == "decay":
        init_decay(new)
    elif fill == "time_step":
        init_time_steps(new, generator)
    return new.to(like.dtype)


@torch.no_grad()
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
    config = expanded_config(model.config, hidden_size, width_levels)
    generator = torch.Generator().manual_seed(seed)
    wide = AdambaForCausalLM(config).to(model.dtype)
    target = wide.state_dict()
    for name, old in model.state_dict().items():
        new = expand_tensor(name, old.cpu(), model.config, config, generator)
        if new.shape != target[name].shape:  # only the router's levels may differ in number
            new = target[name]
        target[name] = new
    wide.load_state_dict(target)
    wide.generation_config = copy.deepcopy(model.generation_config)
    return wide.to(model.device).train(model.training)
