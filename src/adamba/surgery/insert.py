"""Phase 0: a dense base becomes a hybrid. Mamba-2 layers that write zero stand between its layers."""

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from adamba.bases import BASES, describe_bases
from adamba.model import AdambaConfig, AdambaForCausalLM

from .axes import layer_of, role_of
from .rules import Surgery, apply, empty_model, fresh_tensor, seed_for

# Fields of the base's config that a hybrid may set otherwise: no weight depends on them.
FREE_FIELDS = ("attention_dropout", "initializer_range", "max_position_embeddings")


def insertion(
    dense: PreTrainedConfig, dense_names: Iterable[str], every: int = 1, seed: int = 0, **overrides
) -> Surgery:
    """The surgery of `insert_mamba` on a base of this configuration, whose parameters are `dense_names`."""
    base = BASES.get(dense.model_type)
    if base is None:
        raise ValueError(f"model_type: {dense.model_type!r} is not a supported base; use {describe_bases()}")
    if every < 1:
        raise ValueError(f"mamba_every: {every} must be at least 1")
    layer_types: list[str] = []
    place: list[int] = []
    for index, kind in enumerate(base.layer_types(dense)):
        place.append(len(layer_types))
        layer_types.append(kind)
        if (index + 1) % every == 0:
            layer_types.append("linear_attention")
    rope_layers = [1] * len(layer_types)
    for index, use_rope in enumerate(base.rope_layers(dense)):
        rope_layers[place[index]] = use_rope
    fields = base.config_fields(dense)
    fields |= {"layer_types": layer_types, "num_hidden_layers": len(layer_types), "rope_layers": rope_layers}
    for key, value in overrides.items():
        if key in fields and key not in FREE_FIELDS and value != fields[key]:
            raise ValueError(f"{key}: {value!r} does not fit the base, whose weights need {fields[key]!r}")
    config = AdambaConfig(**{**fields, **overrides})

    origin = {base.rename(name, place): name for name in dense_names}
    names = empty_model(config).state_dict().keys()
    unexpected = [name for name in origin if name not in names]
    lost = [name for name in names if name not in origin and not _is_ours(name, layer_types)]
    if unexpected or lost:
        raise ValueError(f"surgery: parameters without a place: {unexpected or lost}")

    def tensor(name: str, shape: torch.Size, old: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if name in origin:
            return old[origin[name]]
        # As wide as the initialisation of a new model: a short convolution sees few inputs, so its weights are larger.
        std = (3 * config.mamba_conv_kernel) ** -0.5 if "conv1d" in name else config.initializer_range
        # Drawn in the type it is written in: the bits of rounding fp32 afterwards, in a sixth of the time.
        dtype = getattr(old, "dtype", torch.float32)
        return fresh_tensor(role_of(name).fill, shape, std, dtype, seed_for(name, seed))

    return Surgery(config, tensor, list(enumerate(place)))


def insert_mamba(dense: PreTrainedModel, every: int = 1, seed: int = 0, **overrides) -> AdambaForCausalLM:
    """
    A hybrid with a Mamba-2 layer after every `every`-th layer of `dense`, each with `out_proj = 0`: the same logits.

    Args:
        dense: a Llama (SmolLM2 too), Qwen3, SmolLM3 or NanoChat causal language model of transformers.
        overrides: fields of `AdambaConfig`, for instance `mamba_state_size=128` or `width_levels={...}`.

    Raises:
        ValueError: an architecture that is not supported, an override of what the base's weights fix, or a parameter
            of the base that found no place.
    """
    return apply(insertion(dense.config, dense.state_dict(), every, seed, **overrides), dense)


def _is_ours(name: str, layer_types: list[str]) -> bool:
    """Whether the base has no such parameter: Mamba layers, exit gates and router."""
    layer = layer_of(name)
    in_mamba = layer is not None and layer_types[layer] == "linear_attention"
    return in_mamba or ".exit_gates." in name or ".router." in name
