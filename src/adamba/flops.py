"""
One FLOP model for everything that counts compute: training MFU, the report's curves, and the price of a plan.

Convention: a multiply-add is 2 FLOPs; only matrix work, attention scores and the state-space scan are counted;
embedding look-ups, norms and activations are not. Training costs 3 x the forward pass.
"""

from adamba.model.configuration_adamba import ATTENTION_LAYERS, AdambaConfig

TRAINING_FACTOR = 3  # backward is twice the forward


def attention_layer_flops(config: AdambaConfig, width: int, context_length: int) -> float:
    """Forward FLOPs a token of one attention layer at `width`, each token seeing `context_length / 2` others."""
    num_heads, num_kv_heads = config.heads_at(width)
    query, key_value = num_heads * config.head_dim, num_kv_heads * config.head_dim
    projections = width * (2 * query + 2 * key_value)
    scores = query * context_length  # q·k and weights·v over half the context each
    matrices = 3 if config.mlp_gated else 2
    return 2 * (projections + matrices * width * config.units_at(width)) + 2 * scores


def mamba_layer_flops(config: AdambaConfig) -> float:
    """Forward FLOPs a token of one Mamba-2 layer, its recurrence counted as a decode step does it."""
    inner, states = config.mamba_inner_size, config.mamba_state_size
    conv_channels = inner + 2 * config.mamba_num_groups * states
    projections = config.hidden_size * (inner + conv_channels + config.mamba_num_heads) + inner * config.hidden_size
    convolution = conv_channels * config.mamba_conv_kernel
    recurrence = 3 * inner * states  # decay, input and read-out of each state
    return 2 * (projections + convolution + recurrence)


def layer_flops(config: AdambaConfig, width=None, context_length: int = 0) -> list[float]:
    """Forward FLOPs a token of each layer."""
    widths = iter(config.resolve_width(width))
    return [
        attention_layer_flops(config, next(widths), context_length)
        if kind in ATTENTION_LAYERS
        else mamba_layer_flops(config)
        for kind in config.layer_types
    ]


def head_flops(config: AdambaConfig) -> float:
    return 2.0 * config.hidden_size * config.vocab_size


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


def dense_flops_per_token(config, context_length: int = 0) -> float:
    """Forward FLOPs a token of a dense base of transformers (Llama, Qwen3, SmolLM3, NanoChat)."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key_value = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    matrices = 2 if config.model_type == "nanochat" else 3
    layer = config.hidden_size * (2 * query + 2 * key_value + matrices * config.intermediate_size)
    layers = config.num_hidden_layers * 2 * (layer + query * context_length)
    return layers + 2.0 * config.hidden_size * config.vocab_size


def flops_per_token(config, width=None, context_length: int = 0) -> float:
    """Forward FLOPs a token of a hybrid or of its dense base."""
    if isinstance(config, AdambaConfig):
        return forward_flops_per_token(config, width, context_length)
    return dense_flops_per_token(config, context_length)
