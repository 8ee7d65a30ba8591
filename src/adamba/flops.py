"""
One FLOP model for everything that counts compute: training MFU, the report's curves, and the price of a plan.

Convention: a multiply-add is 2 FLOPs; matrix products, attention scores, the state-space scan and its convolution are
counted; embedding look-ups, norms and activations are not, and neither is what activation checkpointing computes
again. It agrees with `torch.utils.flop_counter` (tests/test_flops.py), which counts the whole square of attention
scores: `causal=False`. By default a token attends to half of its context, as causal kernels compute it.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from adamba.model.configuration_adamba import ATTENTION_LAYERS, AdambaConfig

TRAINING_FACTOR = 3  # backward is twice the forward


class Work(NamedTuple):
    """Forward FLOPs a token. Backward computes `weights` once for the input and once for the parameters, `mixing`
    twice for the inputs, and `remade` once."""

    weights: float  # products with parameters
    mixing: float  # products of activations: attention scores and the scan
    remade: float = 0.0  # the part of `mixing` that backward makes again instead of keeping it

    @property
    def total(self) -> float:
        return self.weights + self.mixing


def attention_layer_work(config: AdambaConfig, width: int, context_length: int, causal: bool = True) -> Work:
    """One attention layer and its MLP at `width`."""
    num_heads, num_kv_heads = config.heads_at(width)
    query, key_value = num_heads * config.head_dim, num_kv_heads * config.head_dim
    projections = width * (2 * query + 2 * key_value)
    matrices = 3 if config.mlp_gated else 2
    scores = 2 * query * context_length * (0.5 if causal else 1.0)  # q·k and weights·v
    return Work(2.0 * (projections + matrices * width * config.units_at(width)), 2.0 * scores)


def mamba_layer_work(config: AdambaConfig, context_length: int) -> Work:
    """One Mamba-2 layer, its scan in chunks (Dao & Gu, 2024, section 6); a decode step is a chunk of one token."""
    inner, states = config.mamba_inner_size, config.mamba_state_size
    chunk = max(1, min(config.mamba_chunk_size, context_length))
    conv_channels = inner + 2 * config.mamba_num_groups * states
    projections = config.hidden_size * (inner + conv_channels + config.mamba_num_heads) + inner * config.hidden_size
    convolution = conv_channels * config.mamba_conv_kernel
    within = config.mamba_num_groups * chunk * states + inner * chunk  # C·B of each group, then their weighted sum
    between = 2 * inner * states  # what a token adds to the state, and what it reads from it
    remade = config.mamba_num_groups * chunk * states + inner * states
    return Work(2.0 * (projections + convolution), 2.0 * (within + between), 2.0 * remade)


def layer_work(config: AdambaConfig, width=None, context_length: int = 0, causal: bool = True) -> list[Work]:
    """Each layer's work a token at `width`."""
    widths = iter(config.resolve_width(width))
    return [
        attention_layer_work(config, next(widths), context_length, causal)
        if kind in ATTENTION_LAYERS
        else mamba_layer_work(config, context_length)
        for kind in config.layer_types
    ]


def layer_flops(config: AdambaConfig, width=None, context_length: int = 0) -> list[float]:
    """Forward FLOPs a token of each layer."""
    return [work.total for work in layer_work(config, width, context_length)]


def head_flops(config: AdambaConfig) -> float:
    return 2.0 * config.hidden_size * config.vocab_size


def gate_flops(config: AdambaConfig) -> float:
    """Forward FLOPs a token of all exit gates; they read detached states, so training costs twice as much."""
    return len(config.gate_layers) * 2.0 * config.exit_gate_size * (config.hidden_size + 1)


def router_flops(config: AdambaConfig) -> float:
    """Forward FLOPs a token of the width router's first matrix; the second one sees one row a sequence."""
    return 2.0 * config.router_size * config.hidden_size


def forward_flops_per_token(
    config: AdambaConfig, width=None, context_length: int = 0, exit_layer: float | None = None
) -> float:
    """
    Forward FLOPs a token at `width` and, with `exit_layer`, when layers after it are skipped (a fractional layer is a
    mean over tokens). Filling the caches of skipped layers is left out.
    """
    layers = layer_flops(config, width, context_length)
    if exit_layer is None:
        return sum(layers) + head_flops(config)
    whole = int(exit_layer)
    partial = (exit_layer - whole) * layers[whole + 1] if whole + 1 < len(layers) else 0.0
    return sum(layers[: whole + 1]) + partial + head_flops(config)


def dense_flops_per_token(config, context_length: int = 0, causal: bool = True) -> float:
    """Forward FLOPs a token of a dense base of transformers (Llama, Qwen3, SmolLM3, NanoChat)."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key_value = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    matrices = 2 if config.model_type == "nanochat" else 3
    layer = config.hidden_size * (2 * query + 2 * key_value + matrices * config.intermediate_size)
    scores = 2 * query * context_length * (0.5 if causal else 1.0)
    layers = config.num_hidden_layers * 2 * (layer + scores)
    return layers + 2.0 * config.hidden_size * config.vocab_size


def flops_per_token(config, width=None, context_length: int = 0) -> float:
    """Forward FLOPs a token of a hybrid or of its dense base."""
    if isinstance(config, AdambaConfig):
        return forward_flops_per_token(config, width, context_length)
    return dense_flops_per_token(config, context_length)


def training_flops_per_token(config, context_length: int, train_only: str = "all", causal: bool = True) -> float:
    """
    Forward and backward FLOPs a token of a plain step. With `train_only` (see `adamba.training.freezing`) frozen
    layers pass gradients on but have none of their own, and below the first layer that learns nothing flows.
    """
    if not isinstance(config, AdambaConfig):
        return TRAINING_FACTOR * dense_flops_per_token(config, context_length, causal)
    layers = layer_work(config, None, context_length, causal)
    head = head_flops(config)
    forward = sum(work.total for work in layers) + head
    if train_only == "all":
        return TRAINING_FACTOR * forward + sum(work.remade for work in layers)
    if "mamba" not in train_only:  # gates and router alone: nothing flows back through the model
        return forward
    mamba = [kind not in ATTENTION_LAYERS for kind in config.layer_types]
    first = mamba.index(True)
    backward = sum(work.weights + 2 * work.mixing + work.remade for work in layers[first:])
    gradients = sum(work.weights for work, learns in zip(layers, mamba, strict=True) if learns)
    return forward + backward + gradients + head


def adapter_flops_per_token(config: AdambaConfig, context_length: int) -> float:
    """A plain step on LoRA adapters: frozen weights pass gradients on; the adapters' own products are left out."""
    layers = layer_work(config, None, context_length)
    return sum(2 * work.weights + 3 * work.mixing + work.remade for work in layers) + 2 * head_flops(config)


def elastic_flops_per_token(
    config: AdambaConfig,
    context_length: int,
    width_weights: Mapping[str, float] | None = None,
    num_sampled_widths: int = 1,
    distill: bool = True,
    num_sampled_exits: int = 1,
    causal: bool = True,
) -> float:
    """
    Forward and backward FLOPs a token of an elastic step (`adamba.training.elastic`), the mean over its draws: the
    full width when `distill`, the sampled ones, an exit's head each, gates with every pass, the router and the full
    width's head once more with narrow ones. Logits that a large vocabulary makes again in the backward pass are left
    out, as activation checkpointing is.
    """
    names = list(config.width_levels)
    weights = [width_weights.get(name, 0.0) if width_weights else rank + 1.0 for rank, name in enumerate(names)]
    if distill:
        weights[-1] = 0.0  # the full width runs anyway

    def one_pass(level: int) -> float:
        width = None if level == len(names) - 1 else config.width_levels[names[level]]
        layers = layer_work(config, width, context_length, causal)
        forward = sum(work.total for work in layers) + head_flops(config)
        return TRAINING_FACTOR * forward + sum(work.remade for work in layers) + 2 * gate_flops(config)

    full = len(names) - 1
    times = sampling_counts(weights, num_sampled_widths)
    narrow = sum(count * one_pass(level) for level, count in enumerate(times) if level != full)
    num_narrow = sum(times) - times[full]
    whole = one_pass(full) * (1.0 if distill else 1.0 - num_narrow)
    exits = TRAINING_FACTOR * min(num_sampled_exits, len(config.gate_layers)) * head_flops(config)
    taught = 2 * router_flops(config) + head_flops(config)
    return whole + narrow + exits + (num_narrow * taught if distill else 0.0)


def sampling_counts(weights: Sequence[float], num_draws: int) -> list[float]:
    """How often each item is drawn, on average, in `num_draws` draws by weight without replacement."""
    counts = [0.0] * len(weights)
    choices = [index for index, weight in enumerate(weights) if weight > 0]
    for order in itertools.permutations(choices, min(num_draws, len(choices))):
        chance, left = 1.0, float(sum(weights))
        for index in order:
            chance *= weights[index] / left
            left -= weights[index]
        for index in order:
            counts[index] += chance
    return counts


def num_parameters(config: AdambaConfig) -> dict[str, int]:
    """
    Parameters of a hybrid by part: `embedding`, `attention` (with the MLPs), `mamba`, `gates` (of the exits),
    `router`, `head` (0 when tied) and `norm`. Sums to `model.num_parameters()`.
    """
    hidden, gain = config.hidden_size, int(config.norm_gain)
    norm = hidden * gain
    attention = 0
    for width in config.attention_widths:
        num_heads, num_kv_heads = config.heads_at(width)
        query, key_value, units = num_heads * config.head_dim, num_kv_heads * config.head_dim, config.units_at(width)
        attention += width * (2 * query + 2 * key_value) + (3 if config.mlp_gated else 2) * width * units
        attention += (query + 2 * key_value) * config.attention_bias + width * config.attention_output_bias
        attention += ((1 + config.mlp_gated) * units + width) * config.mlp_bias
        attention += 2 * width * gain + (2 * config.head_dim * gain if config.qk_norm else 0)
    inner, states = config.mamba_inner_size, config.mamba_num_groups * config.mamba_state_size
    projections = hidden * (2 * inner + 2 * states + config.mamba_num_heads) + inner * hidden
    convolution = (inner + 2 * states) * (config.mamba_conv_kernel + 1)
    layer = projections + convolution + 3 * config.mamba_num_heads + inner + norm
    mamba = (config.num_hidden_layers - config.num_attention_layers) * layer
    gate = config.exit_gate_size * (hidden + 2) + 1
    verdicts = config.num_attention_layers * max(1, len(config.width_levels) - 1)
    router = config.router_size * (hidden + 1 + verdicts) + verdicts
    embedding = config.vocab_size * hidden
    return {
        "embedding": embedding,
        "attention": attention,
        "mamba": mamba,
        "gates": len(config.gate_layers) * gate,
        "router": router,
        "head": 0 if config.tie_word_embeddings else embedding,
        "norm": norm * (2 if config.embedding_norm else 1),
    }


def num_trained(config: AdambaConfig, train_only: str = "all") -> int:
    """Parameters that learn under a recipe's `train_only`."""
    parts = num_parameters(config)
    names = list(parts) if train_only == "all" else re.findall("mamba|gates|router", train_only)
    if "gates" in names and train_only != "all":
        names.append("router")  # it judges, as they do
    return sum(parts[name] for name in names)


def num_adapter_parameters(config: AdambaConfig, rank: int) -> int:
    """Parameters of LoRA adapters on every linear layer of a hybrid but its head, gates and router."""
    total = 0
    for width in config.attention_widths:
        num_heads, num_kv_heads = config.heads_at(width)
        units, query, key_value = config.units_at(width), num_heads * config.head_dim, num_kv_heads * config.head_dim
        total += 2 * (width + query) + 2 * (width + key_value) + (2 + config.mlp_gated) * (width + units)
    inner, states = config.mamba_inner_size, config.mamba_num_groups * config.mamba_state_size
    mamba = config.hidden_size + 2 * inner + 2 * states + config.mamba_num_heads + inner + config.hidden_size
    return rank * (total + (config.num_hidden_layers - config.num_attention_layers) * mamba)
