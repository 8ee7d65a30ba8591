"""Small random models for the tests: every supported base, and hybrids of many shapes, with weights large enough that
a mistake shows in the logits."""

import random

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from adamba.model import AdambaConfig, AdambaForCausalLM

VOCAB = 97
BASES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True, "attention_bias": True}),
    "qwen3": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "nanochat": (NanoChatConfig, NanoChatForCausalLM, {}),
}


def shake(model: PreTrainedModel, seed: int, std: float = 0.15) -> PreTrainedModel:
    """Give every parameter, norms and biases included, a random part; Mamba's own parameters keep their range."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", "dt_bias")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def dense_base(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    config_class, model_class, extra = BASES[kind]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 144,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return shake(model_class(config_class(**{**settings, **extra, **overrides})).to(dtype), seed)


def random_config(seed: int, **overrides) -> AdambaConfig:
    """A hybrid of random shape: GQA or MHA, tied or not, gated or not, sliding or not, any norm and qk-norm."""
    choose = random.Random(seed)
    num_kv_heads, group, head_dim = choose.choice([4, 8]), choose.choice([1, 2]), choose.choice([4, 8])
    hidden = num_kv_heads * group * head_dim
    num_layers = choose.choice([4, 6])
    sliding = choose.random() < 0.3
    kinds = ["sliding_attention" if sliding else "full_attention", "linear_attention", "full_attention"]
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": choose.choice([2, 3]) * hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_kv_heads * group,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "layer_types": [kinds[index % 3] for index in range(num_layers)],
        "sliding_window": 5 if sliding else None,
        "tie_word_embeddings": choose.random() < 0.5,
        "mlp_gated": choose.random() < 0.5,
        "norm_gain": choose.random() < 0.7,
        "embedding_norm": choose.random() < 0.3,
        "qk_norm": choose.choice([None, "before_rope", "after_rope"]),
        "rope_sign": choose.choice([1, -1]),
        "attention_bias": choose.random() < 0.3,
        "logit_softcap": choose.choice([None, 15.0]),
        "mamba_state_size": choose.choice([4, 8]),
        "mamba_num_groups": 4,
        "mamba_chunk_size": choose.choice([4, 8]),
        "width_levels": {"ghost": hidden // 4, "normal": hidden // 2, "think": hidden},
        "first_exit_layer": 1,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    return AdambaConfig(**{**settings, **overrides})


def hybrid(seed: int, dtype: torch.dtype = torch.float32, **overrides) -> AdambaForCausalLM:
    torch.manual_seed(seed)
    return shake(AdambaForCausalLM(random_config(seed, **overrides)).to(dtype), seed)


def tokens(seed: int, batch: int = 2, length: int = 19) -> torch.Tensor:
    """Token ids (batch, length) without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def smallest_config(vocab_size: int, **overrides) -> AdambaConfig:
    """One attention and one Mamba-2 layer of 32 channels: for tests of what surrounds the model."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "linear_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_head_dim": 8,
        "mamba_state_size": 8,
        "mamba_num_groups": 2,
        "width_levels": {"ghost": 16, "think": 32},
    }
    return AdambaConfig(vocab_size=vocab_size, **{**settings, **overrides})


def labelled(seed: int, batch: int = 3, prompt: int = 4) -> dict[str, torch.Tensor]:
    """Rows whose first `prompt` tokens carry no label, and the second row's last three neither."""
    ids = tokens(seed, batch=batch)
    labels = ids.clone()
    labels[:, :prompt] = -100
    labels[1, -3:] = -100
    return {"input_ids": ids, "labels": labels}
