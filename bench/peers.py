"""
Models of one size by different hands: Adamba, transformers' hybrids with the same layers, a Llama of equal parameters.

Adamba has pairs of layers, attention with an MLP and then Mamba-2 without one. NemotronH is made of the same blocks:
attention, MLP (of two matrices, so 1.5 × the units), Mamba-2. Bamba has an MLP after every mixer, so half the units.
Both run with Adamba's chunk size, which suits their torch path better than their own defaults.
"""

from typing import Any

import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
)
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.training.freezing import freeze_idle

VOCAB = 1024
HYBRIDS = ("bamba", "nemotron_h")
KINDS = ("adamba", *HYBRIDS, "llama")
MIXERS = (BambaMixer, NemotronHMamba2Mixer)
HEAD_DIM = 64


def adamba_config(hidden: int, num_layers: int, vocab: int = VOCAB, **mamba: int) -> AdambaConfig:
    heads = max(1, hidden // HEAD_DIM)
    step = hidden // 4
    return AdambaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=2**15,
        width_levels={str(width): width for width in range(step, hidden + 1, step) if width % (hidden // heads) == 0},
        pad_token_id=0,
        **mamba,
    )


def build(kind: str, hidden: int, num_layers: int, vocab: int = VOCAB, **mamba: int) -> PreTrainedModel:
    """One of `KINDS` with random weights, in training mode; `num_layers` are Adamba's, `mamba` sizes of its mixer."""
    torch.manual_seed(0)
    config = adamba_config(hidden, num_layers, vocab, **mamba)
    pairs = num_layers // 2
    shared: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if kind == "adamba":
        model = AdambaForCausalLM(config)
        freeze_idle(model)
        return model.train()
    if kind == "bamba":
        return BambaForCausalLM(
            BambaConfig(
                **shared,
                intermediate_size=config.intermediate_size // 2,
                num_hidden_layers=num_layers,
                attn_layer_indices=list(range(0, num_layers, 2)),
                mamba_n_heads=config.mamba_num_heads,
                mamba_d_head=config.mamba_head_dim,
                mamba_n_groups=config.mamba_num_groups,
                mamba_d_state=config.mamba_state_size,
                mamba_d_conv=config.mamba_conv_kernel,
                mamba_expand=config.mamba_expand,
                mamba_chunk_size=config.mamba_chunk_size,
            )
        ).train()
    if kind == "nemotron_h":
        return NemotronHForCausalLM(
            NemotronHConfig(
                **shared,
                intermediate_size=config.intermediate_size * 3 // 2,
                layers_block_type=["full_attention", "mlp", "linear_attention"] * pairs,
                mamba_num_heads=config.mamba_num_heads,
                mamba_head_dim=config.mamba_head_dim,
                n_groups=config.mamba_num_groups,
                ssm_state_size=config.mamba_state_size,
                conv_kernel=config.mamba_conv_kernel,
                expand=config.mamba_expand,
                chunk_size=config.mamba_chunk_size,
            )
        ).train()
    assert kind == "llama", kind
    target = sum(parameter.numel() for parameter in AdambaForCausalLM(config).parameters() if parameter.requires_grad)
    rest = target - 2 * vocab * hidden - num_layers * 4 * hidden**2
    units = max(8, round(rest / (num_layers * 3 * hidden) / 8) * 8)
    return LlamaForCausalLM(LlamaConfig(**shared, intermediate_size=units, num_hidden_layers=num_layers)).train()
