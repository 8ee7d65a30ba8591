"""Measure what share of its rated speed this machine reaches on each phase's own step: `run_plan.py --calibrate`."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from adamba.errors import UserError
from adamba.flops import training_flops_per_token
from adamba.gpus import CPU, Gpu, find_gpu, gpu_named
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.training.compiling import compile_for_training
from adamba.training.elastic import ElasticArguments, Tally, draw, elastic_loss
from adamba.training.freezing import freeze_all_but, freeze_idle
from adamba.training.head_losses import next_token_losses

from .phases import ELASTIC_KEYS, PlannedPhase
from .price import rated_tflops

WHOLE = 1e9  # a model above this many parameters is measured on its first layers
NUM_LAYERS = 4
NUM_STEPS = 3
NUM_DOCUMENTS = 4  # of a row
NUM_DRAWS = 1000  # of widths, to know how often each is drawn
MATMUL_SIZE = 1024


def measure(phases: Sequence[PlannedPhase], name: str) -> tuple[Gpu, dict[str, float]]:
    """
    The device, and the MFU of each training phase on it: forward, backward and the optimizer's share of a step, on one
    device, at the recipe's batch and length. Communication between devices is not in it.

    Raises:
        UserError: this machine is not the one that is asked for, or too small to tell.
    """
    on_cpu = name == CPU
    if on_cpu:
        tflops = matmul_flops_per_second() / 1e12
        gpu = Gpu(CPU, tflops, tflops, psutil.virtual_memory().total / 2**30)
    else:
        gpu = find_gpu(name)
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
        here = gpu_named(found)
        if here != gpu:
            usable = CPU if here is None else here.name
            raise UserError(f"--calibrate: this machine has {found}, not {gpu.name}; run it there, or --gpu {usable}")
    training = [phase for phase in phases if not phase.is_surgery]
    largest = max(training, key=lambda phase: phase.num_parameters)
    if on_cpu and largest.num_parameters > WHOLE:
        size = f"{largest.num_parameters / 1e9:.1f} G parameters"
        raise UserError(f"--calibrate: {largest.name} has {size}, too many for a CPU; run it where the plan will run")
    measured = {
        phase.name: flops_per_second(dataclasses.replace(phase, config=shortened(phase)))
        / (rated_tflops(phase, gpu) * 1e12)
        for phase in training
    }
    return gpu, measured


def matmul_flops_per_second() -> float:
    """What a CPU is "rated" at: its fastest product of large fp32 matrices."""
    left, right = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE)
    seconds = min(_seconds(lambda: left @ right) for _ in range(10))
    return 2 * MATMUL_SIZE**3 / seconds


def flops_per_second(phase: PlannedPhase, num_steps: int = NUM_STEPS) -> float:
    """
    Model FLOPs a second of the phase's micro-batches, with the optimizer step that several of them share. Rows hold
    `NUM_DOCUMENTS` each, as packed rows do, and count as one; each kind of micro-batch counts as often as it is drawn.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _model(phase.config, phase.values.get("dtype", "float32"), device).train()
    freeze_all_but(model, str(phase.values.get("train_only", "all")))
    freeze_idle(model, _elastic(phase))
    if phase.checkpoints_activations:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if phase.values.get("torch_compile") and device == "cuda" and isinstance(model, AdambaForCausalLM):
        compile_for_training(model)
    micro_batch = _micro_batch(phase, model, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9, fused=True)
    kinds = _kinds(phase)
    for place in kinds:
        micro_batch(place)  # the first of a kind compiles, and makes what stays
    optimizer.step()
    seconds = 0.0
    for place, share in kinds.items():
        times = [_seconds(partial(micro_batch, place)) for _ in range(max(1, num_steps // len(kinds)))]
        seconds += share * sum(times) / len(times)
    shared_by = int(phase.values.get("gradient_accumulation_steps", 1))
    seconds += median(_seconds(optimizer.step) for _ in range(num_steps)) / shared_by
    flops = phase.flops_per_token
    if not phase.is_elastic:
        flops = training_flops_per_token(phase.config, phase.length, str(phase.values.get("train_only", "all")))
    return flops * _num_rows(phase) * phase.length / seconds


def _num_rows(phase: PlannedPhase) -> int:
    return int(phase.values.get("per_device_train_batch_size", 8))


def _elastic(phase: PlannedPhase) -> ElasticArguments:
    options = {key: phase.values[key] for key in ELASTIC_KEYS if key in phase.values}
    return ElasticArguments(elastic=phase.is_elastic, **options)


def _kinds(phase: PlannedPhase) -> dict[int, float]:
    """Micro-batches that stand for all, by the widths they draw -> how often those are drawn."""
    if not phase.is_elastic:
        return {0: 1.0}
    drawn = [tuple(draw(phase.config, _elastic(phase), 0, place, 0).widths) for place in range(NUM_DRAWS)]
    return {drawn.index(widths): count / NUM_DRAWS for widths, count in Counter(drawn).items()}


def _micro_batch(phase: PlannedPhase, model: PreTrainedModel, device: str) -> Callable[[int], None]:
    """Forward and backward of the micro-batch at a place of the run's draws."""
    rows, length = _num_rows(phase), phase.length
    input_ids = torch.randint(0, phase.config.vocab_size, (rows, length), device=device)
    document = max(1, -(-length // NUM_DOCUMENTS))
    batch = {"input_ids": input_ids, "position_ids": (torch.arange(length, device=device) % document).expand(rows, -1)}
    mixed = phase.is_mixed and device == "cuda"
    elastic = _elastic(phase)

    def run(place: int) -> None:
        with torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext():
            if phase.is_elastic:
                chosen = draw(model.config, elastic, 0, place, 0)
                labelled = batch | {"labels": input_ids}
                loss = elastic_loss(model, model, labelled, elastic, chosen, input_ids.numel(), Tally())
            else:
                loss = next_token_losses(model, model, batch, input_ids)[0] / input_ids.numel()
        loss.backward()

    return run


def shortened(phase: PlannedPhase) -> Any:
    """The phase's config, of a large model its first layers: a layer is as fast in four as in sixty."""
    config = phase.config
    if phase.num_parameters <= WHOLE or not isinstance(config, AdambaConfig):
        return config
    kinds = config.layer_types[:NUM_LAYERS]
    changes = {"num_hidden_layers": NUM_LAYERS, "layer_types": kinds, "rope_layers": config.rope_layers[:NUM_LAYERS]}
    attention = sum(kind != "linear_attention" for kind in kinds)
    changes |= {"attention_widths": config.attention_widths[:attention], "first_exit_layer": 1}
    return AdambaConfig.from_dict(config.to_dict() | changes)


def _model(config: Any, dtype: str, device: str) -> PreTrainedModel:
    with torch.device(device):
        if isinstance(config, AdambaConfig):
            return AdambaForCausalLM(config).to(getattr(torch, dtype))
        fields = {key: value for key, value in vars(config).items() if value is not None}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
