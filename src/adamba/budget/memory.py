"""Memory of a training run on one GPU: an estimate from sizes, to see beforehand what cannot fit.

Weights, gradients and optimizer state follow from how they are stored; the bytes of logits were measured on a CPU
(`bench/logits_memory.py`), where SFT and pretraining of a hybrid hold a chunk of them at a time; activations are what
each layer's operations save, with `mamba_ssm`'s kernels. One phase was compared with a GPU (`bench/README.md`).
"""

from adamba.model.configuration_adamba import ATTENTION_LAYERS, AdambaConfig

from .phases import PlannedPhase

LOGIT_BYTES = 16  # logits, their fp32 copy, log-softmax and gradient (13.7 were measured in fp32)
CHUNK_LOGIT_BYTES = 18  # the same of a chunk, whose logits are halves on a GPU
TARGET_LOGIT_BYTES = 10  # more where it learns from those of the full width
LOGITS_AT_ONCE = 2**27  # of `adamba.training.head_losses` on a GPU; importing it would import torch
CHUNKED = ("run_pretrain.py", "run_sft.py")
USABLE_FRACTION = 0.92  # the rest goes to the CUDA context, kernels' workspaces and fragmentation
BUCKET_BYTES = 2e9  # DeepSpeed's reduce and gather buckets
GIB = 2**30


def memory_gib(phase: PlannedPhase, num_gpus: int | None = None) -> dict[str, float]:
    """
    GiB on one GPU by part: `weights`, `gradients`, `optimizer`, `activations`, `logits`; empty for surgery. What the
    recipe shards is sharded over `num_gpus`, by default as many as the recipe was written for.
    """
    if phase.is_surgery:
        return {}
    launch, total, trained = phase.launch, phase.num_parameters, phase.num_trained
    loaded = 2 if launch.deepspeed or phase.values.get("dtype") in ("bfloat16", "float16") else 4  # bytes of a weight
    # accelerate's FSDP computes in the mixed precision, and keeps whatever learns in fp32 (`fsdp2_prepare_model`).
    mixed_fsdp = launch.fsdp and phase.is_mixed
    learned, computed = (4, 2) if mixed_fsdp else (loaded, loaded)
    processes = launch.num_processes if num_gpus is None else num_gpus
    mixed = 2 if phase.is_mixed else 0

    def held(shards: int) -> float:
        """The part of something sharded that stays on each GPU."""
        return 1 / processes if shards > 1 else 1.0

    moment = 4 if launch.deepspeed else learned  # torch keeps moments as it keeps the weights
    state = moment if phase.values.get("use_muon") else 2 * moment
    if launch.deepspeed:
        state += 4  # fp32 master weights
    weights = (loaded * (total - trained) + learned * trained) * held(launch.parameter_shards)
    gradients = learned * trained * held(launch.gradient_shards)
    if launch.deepspeed:
        gradients += BUCKET_BYTES
    elif processes > 1 and launch.parameter_shards == 1:
        gradients += learned * trained  # DDP's buckets hold them a second time
    copied = phase.has_reference and not phase.uses_adapters  # else it is the model itself, its adapters off
    kept = {
        "weights": 0.0 if launch.offloads_parameters else weights,
        "reference": loaded * total * held(launch.parameter_shards) * (copied and not launch.offloads_parameters),
        "gradients": gradients,
        "optimizer": 0.0 if launch.offloads_optimizer else state * trained * held(launch.optimizer_shards),
    }
    tokens = int(phase.values.get("per_device_train_batch_size", 8)) * phase.length
    tokens *= 2 if phase.script == "run_dpo.py" else 1
    stream = min(loaded, computed)  # autocast leaves the residual stream in the precision of the embedding
    forward = {
        "activations": activation_bytes(phase, tokens, mixed or computed, stream),
        "logits": logit_bytes(phase, tokens) + head_gradient_bytes(phase, tokens, learned, mixed or computed),
    }
    caches = cache_bytes(phase, loaded)
    if caches > sum(forward.values()):  # when episodes are played, nothing is kept for a backward pass
        forward = {"activations": 0.0, "logits": 0.0, "caches": caches}
    if float(phase.values.get("old_weight_lr_scale", 1.0)) < 1:
        # The optimizer step copies the weights, when activations are gone: the larger of the two counts.
        copies = learned * trained
        if copies > sum(forward.values()):
            forward = {"activations": 0.0, "logits": 0.0, "copies of old weights": copies}
    return {name: value / GIB for name, value in (kept | forward).items()}


def logit_bytes(phase: PlannedPhase, tokens: int) -> float:
    """What the head of a micro-batch holds at its peak."""
    logits = tokens * phase.config.vocab_size
    if phase.script in CHUNKED and isinstance(phase.config, AdambaConfig):
        taught = phase.is_elastic and phase.values.get("distill", True)
        return (CHUNK_LOGIT_BYTES + TARGET_LOGIT_BYTES * taught) * min(logits, LOGITS_AT_ONCE)
    return LOGIT_BYTES * logits


def head_gradient_bytes(phase: PlannedPhase, tokens: int, learned: int, computed: int) -> float:
    """
    Where the head takes several chunks, its gradient is made with the losses (`adamba.training.head_gradients`): for
    each pass and exit one of the weight, if that learns, and one of the states stay until the backward pass.
    """
    config = phase.config
    if phase.script not in CHUNKED or not isinstance(config, AdambaConfig) or config.logit_softcap is not None:
        return 0.0
    if tokens * config.vocab_size <= LOGITS_AT_ONCE or phase.launch.parameter_shards > 1:
        return 0.0
    heads = len(_widths(phase)) + phase.is_elastic * int(phase.values.get("num_sampled_exits", 1))
    learns = not phase.uses_adapters and phase.values.get("train_only", "all") == "all"
    return float(heads * config.hidden_size * (learned * config.vocab_size * learns + computed * tokens))


def cache_bytes(phase: PlannedPhase, loaded: int) -> float:
    """
    Keys, values and Mamba states (fp32) of the completions that GRPO plays at once, which their turns keep
    (`adamba.training.conversations`). Their prompts, whose length no recipe says, are left out; a team keeps none.
    """
    config, values = phase.config, phase.values
    if phase.script != "run_grpo.py" or values.get("roles") or not isinstance(config, AdambaConfig):
        return 0.0
    steps = int(values.get("steps_per_generation") or values.get("gradient_accumulation_steps", 1))
    rows = int(values.get("per_device_train_batch_size", 8)) * steps
    kinds = layer_kinds(config)
    num_attention = sum(kind in ATTENTION_LAYERS for kind in kinds)
    keys = 2 * config.num_key_value_heads * config.head_dim * loaded * phase.length
    states = 4 * config.mamba_inner_size * config.mamba_state_size
    return float(rows * (num_attention * keys + (len(kinds) - num_attention) * states))


def activation_bytes(phase: PlannedPhase, tokens: int, computed: int, stream: int) -> float:
    """
    What a micro-batch keeps for its backward pass: of an elastic one the full width's and that of the widest that may
    be drawn. With checkpointing each layer's input, and the inside of one layer.

    Args:
        computed: bytes of a number that a matrix product takes.
        stream: bytes of a number of the residual stream.
    """
    config = phase.config
    compiled = bool(phase.values.get("torch_compile"))
    total = 0.0
    for width in _widths(phase):
        inside = [
            inside_bytes(config, kind, width, computed, stream, compiled) * tokens for kind in layer_kinds(config)
        ]
        if phase.checkpoints_activations:
            total += stream * config.hidden_size * tokens * len(inside)
            total += max(inside) if width == config.hidden_size else 0.0
        else:
            total += sum(inside)
        if phase.is_elastic:
            total += computed * config.hidden_size * tokens * len(config.gate_layers)
    return total


def _widths(phase: PlannedPhase) -> list[int]:
    """Channels of the passes whose activations are held at once, at most."""
    config = phase.config
    if not phase.is_elastic:
        return [config.hidden_size]
    narrow = sorted(width for width in config.width_levels.values() if width < config.hidden_size)
    drawn = narrow[-int(phase.values.get("num_sampled_widths", 1)) :]
    return [config.hidden_size, *drawn] if phase.values.get("distill", True) else [config.hidden_size]


def layer_kinds(config) -> list[str]:
    if isinstance(config, AdambaConfig):
        return list(config.layer_types)
    return ["full_attention"] * config.num_hidden_layers


def inside_bytes(config, kind: str, width: int, computed: int, stream: int, compiled: bool) -> float:
    """
    Bytes a token that one layer keeps, its input included, by what its operations save. Compiled, cheap ones are made
    again in the backward pass; else each saves its own inputs, and each projection a copy of its own.
    """
    hidden = config.hidden_size
    if kind in ATTENTION_LAYERS:
        share = width / hidden
        head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        query = share * config.num_attention_heads * head_dim
        key_value = 2 * share * config.num_key_value_heads * head_dim
        gated = getattr(config, "mlp_gated", True)
        units = share * config.intermediate_size * (2 if gated else 1)
        kept = computed * (2 * width + 2 * query + key_value + units + share * config.intermediate_size)
        if not compiled:
            kept += computed * (width * (3 if gated else 2) + (units if gated else 0)) + 4 * (query + key_value / 2)
        return kept + stream * (hidden + width)
    inner, states = config.mamba_inner_size, 2 * config.mamba_num_groups * config.mamba_state_size
    # What in_proj, the scan and the gated norm make: mamba_ssm's kernel makes the convolution again.
    kept = computed * (hidden + 4 * inner + states + config.mamba_num_heads)
    return kept + stream * hidden
