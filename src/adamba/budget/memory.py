"""Memory of a training run on one GPU: an estimate from sizes, to see beforehand what cannot fit.

Weights, gradients and optimizer state follow from how they are stored; the bytes of logits were measured on a CPU
(`bench/logits_memory.py`), where SFT and pretraining of a hybrid hold a chunk of them at a time; activations are
counted for a layer at a time, as activation checkpointing keeps them.
"""

from adamba.model.configuration_adamba import ATTENTION_LAYERS, AdambaConfig

from .phases import PlannedPhase

LOGIT_BYTES = 16  # logits, their fp32 copy, log-softmax and gradient (13.7 were measured in fp32)
CHUNK_LOGIT_BYTES = 36  # the same of a chunk, and those of the full width that it learns from
LOGITS_AT_ONCE = 2**24  # of `adamba.training.head_losses`, which would import torch
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
    mixed_fsdp = launch.fsdp and bool(phase.values.get("bf16") or phase.values.get("fp16"))
    learned, computed = (4, 2) if mixed_fsdp else (loaded, loaded)
    processes = launch.num_processes if num_gpus is None else num_gpus

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
    kept = {
        "weights": 0.0 if launch.offloads_parameters else weights,
        "gradients": gradients,
        "optimizer": 0.0 if launch.offloads_optimizer else state * trained * held(launch.optimizer_shards),
    }
    tokens = int(phase.values.get("per_device_train_batch_size", 8)) * phase.length
    tokens *= 2 if phase.script == "run_dpo.py" else 1
    forward = {
        "activations": activation_bytes(phase, tokens, computed),
        "logits": logit_bytes(phase, tokens),
    }
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
        return CHUNK_LOGIT_BYTES * min(logits, LOGITS_AT_ONCE)
    return LOGIT_BYTES * logits


def activation_bytes(phase: PlannedPhase, tokens: int, width: int) -> float:
    """What a micro-batch keeps for backward: with checkpointing each layer's input, and one layer's inside."""
    config = phase.config
    passes = 2 if phase.is_elastic and phase.values.get("distill", True) else 1
    residual = tokens * config.hidden_size * width
    inside = [inside_bytes(config, kind, width) * tokens for kind in set(layer_kinds(config))]
    if phase.values.get("activation_checkpointing") or phase.values.get("gradient_checkpointing"):
        return passes * residual * len(layer_kinds(config)) + max(inside)
    return passes * sum(inside_bytes(config, kind, width) * tokens + residual for kind in layer_kinds(config))


def layer_kinds(config) -> list[str]:
    if isinstance(config, AdambaConfig):
        return list(config.layer_types)
    return ["full_attention"] * config.num_hidden_layers


def inside_bytes(config, kind: str, width: int) -> float:
    """Bytes a token inside a layer: norms in fp32, projections, hidden units or the scan's inputs, and gradients."""
    hidden = config.hidden_size
    if kind in ATTENTION_LAYERS:
        units = config.intermediate_size * (3 if getattr(config, "mlp_gated", True) else 2)
        return 2 * width * (6 * hidden + units) + 8 * hidden
    inner = config.mamba_inner_size
    chunks = config.mamba_chunk_size * config.mamba_num_heads  # decay between the tokens of a chunk, for each head
    return 2 * width * (8 * inner + hidden) + 4 * chunks
