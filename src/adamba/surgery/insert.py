"""Phase 0: a dense base becomes a hybrid. Mamba-2 layers that write zero stand between its layers."""

import copy

import torch
from transformers import PreTrainedModel

from adamba.model import AdambaConfig, AdambaForCausalLM

from .bases import BASES, describe_bases

# Fields of the base's config that a hybrid may set otherwise: no weight depends on them.
FREE_FIELDS = ("attention_dropout", "initializer_range", "max_position_embeddings")


@torch.no_grad()
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
    base = BASES.get(dense.config.model_type)
    if base is None:
        raise ValueError(f"model_type: {dense.config.model_type!r} is not a supported base; use {describe_bases()}")
    if every < 1:
        raise ValueError(f"mamba_every: {every} must be at least 1")
    layer_types: list[str] = []
    place: list[int] = []
    for index, kind in enumerate(base.layer_types(dense.config)):
        place.append(len(layer_types))
        layer_types.append(kind)
        if (index + 1) % every == 0:
            layer_types.append("linear_attention")
    rope_layers = [1] * len(layer_types)
    for index, use_rope in enumerate(base.rope_layers(dense.config)):
        rope_layers[place[index]] = use_rope
    fields = base.config_fields(dense.config)
    fields |= {"layer_types": layer_types, "num_hidden_layers": len(layer_types), "rope_layers": rope_layers}
    for key, value in overrides.items():
        if key in fields and key not in FREE_FIELDS and value != fields[key]:
            raise ValueError(f"{key}: {value!r} does not fit the base, whose weights need {fields[key]!r}")
    config = AdambaConfig(**{**fields, **overrides})

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hybrid = AdambaForCausalLM(config).to(dense.dtype)
    hybrid.config._attn_implementation = dense.config._attn_implementation
    renamed = {base.rename(name, place): tensor.cpu() for name, tensor in dense.state_dict().items()}
    missing, unexpected = hybrid.load_state_dict(renamed, strict=False)
    ours = ("mixer.", "exit_gates.", "router.")
    lost = [name for name in missing if not any(part in name for part in ours) and not _mamba_norm(name, layer_types)]
    if unexpected or lost:
        raise ValueError(f"surgery: parameters without a place: {unexpected or lost}")
    for layer in hybrid.model.layers:
        if hasattr(layer, "mixer"):
            layer.mixer.out_proj.weight.zero_()
    if dense.can_generate():
        hybrid.generation_config = copy.deepcopy(dense.generation_config)
        # Marked as derived, a saved generation config would lose `width` and the like when it is loaded.
        hybrid.generation_config._from_model_config = False
    return hybrid.to(dense.device).train(dense.training)


def _mamba_norm(name: str, layer_types: list[str]) -> bool:
    return any(
        name == f"model.layers.{index}.norm.weight"
        for index, kind in enumerate(layer_types)
        if kind == "linear_attention"
    )
