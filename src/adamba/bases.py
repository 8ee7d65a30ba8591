"""The dense architectures that phase 0 accepts: how each one's configuration and parameter names translate."""

import re
from dataclasses import dataclass

from transformers import PretrainedConfig

COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "attention_bias",
    "attention_dropout",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class Base:
    """One architecture. `fixed`: AdambaConfig fields that it implies; `copied`: its field -> ours; `names`: its
    parameter names -> ours, inside a layer."""

    name: str
    fixed: dict
    copied: dict
    names: dict

    def config_fields(self, config: PretrainedConfig) -> dict:
        fields = {key: getattr(config, key) for key in COMMON_FIELDS if hasattr(config, key)}
        fields |= {ours: getattr(config, theirs) for theirs, ours in self.copied.items()}
        head_dim = getattr(config, "head_dim", None)
        fields["head_dim"] = head_dim or config.hidden_size // config.num_attention_heads
        return {**fields, **self.fixed}

    def layer_types(self, config: PretrainedConfig) -> list[str]:
        return list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)

    def rope_layers(self, config: PretrainedConfig) -> list[int]:
        return list(getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers)

    def rename(self, name: str, place: list[int]) -> str:
        """The base's parameter name -> ours, its layer `i` standing at `place[i]`."""
        for theirs, ours in self.names.items():
            name = name.replace(theirs, ours)
        return re.sub(r"^model\.layers\.(\d+)\.", lambda match: f"model.layers.{place[int(match.group(1))]}.", name)


BASES = {
    "llama": Base("Llama", fixed={}, copied={"mlp_bias": "mlp_bias"}, names={}),
    "qwen3": Base("Qwen3", fixed={"qk_norm": "before_rope"}, copied={"sliding_window": "sliding_window"}, names={}),
    "smollm3": Base(
        "SmolLM3", fixed={}, copied={"sliding_window": "sliding_window", "mlp_bias": "mlp_bias"}, names={}
    ),
    "nanochat": Base(
        "NanoChat",
        fixed={
            "qk_norm": "after_rope",
            "rope_sign": -1,
            "norm_gain": False,
            "embedding_norm": True,
            "mlp_gated": False,
        },
        copied={"final_logit_softcapping": "logit_softcap"},
        names={"mlp.fc1.": "mlp.up_proj.", "mlp.fc2.": "mlp.down_proj."},
    ),
}


def describe_bases() -> str:
    return ", ".join(f"{base.name} ({model_type!r})" for model_type, base in BASES.items())
