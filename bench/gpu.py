"""
What a GPU reaches: MFU of phases 1, 2 and 5, and their memory against the estimate of `run_plan.py`. Needs CUDA.

    pip install -c constraints.txt -e ".[dev,gpu]" && python bench/gpu.py
    python bench/gpu.py --lengths 2048 --quick      # 3 steps, two layers

Two models: the SmolLM2 plan (`recipes/smollm2`, 30 attention and 30 Mamba layers of 576 channels and larger), and the
full plan at its own sizes (`recipes`, 2,048 channels and more) with as many layers as the memory estimate lets fit.
bf16 autocast, one GPU, ten steps (forward, backward, the optimizer's share), micro-batches of 16,384 tokens.

MFU is model FLOPs (`adamba/flops.py`: a multiply-add is 2, the causal half of the scores, the scan and its convolution
counted, what checkpointing computes again not) over the rated dense bf16 speed (`adamba/gpus.py`). Target: above 40 %
for the hybrid, memory within 10 % of the estimate. Published marks: dense 46 to 50 % (nanochat, Fast-LLM on H100),
hybrid Mamba-2 33 to 34 % (NeMo AutoModel).
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from runs import ROOT, write_results

from adamba.budget.calibrate import flops_per_second
from adamba.budget.memory import USABLE_FRACTION, memory_gib
from adamba.budget.phases import Launch, PlannedPhase, read_plan
from adamba.gpus import rated_flops_per_second
from adamba.model import AdambaConfig

PHASES = ("phase1", "phase2", "phase5")
FAMILIES = {"smollm2": "recipes/smollm2", "full plan": "recipes"}
TOKENS = 16_384  # of a micro-batch
TARGET = "mfu 0.40; memory_over_estimate 0.9 to 1.1"


def on_one_gpu(phase: PlannedPhase, length: int, tokens: int = TOKENS) -> PlannedPhase:
    """The phase without sharding, in bf16, at a length."""
    rows = max(1, tokens // length)
    values = {**phase.values, "max_length": length, "per_device_train_batch_size": rows, "bf16": True}
    return dataclasses.replace(phase, values=values, launch=Launch())


def with_layers(phase: PlannedPhase, num_layers: int) -> PlannedPhase:
    """The phase with the first layers of its model."""
    config = phase.config
    kinds = config.layer_types[:num_layers]
    num_attention = sum(kind != "linear_attention" for kind in kinds)
    changes = {
        "num_hidden_layers": num_layers,
        "layer_types": kinds,
        "rope_layers": config.rope_layers[:num_layers],
        "attention_widths": config.attention_widths[:num_attention],
        "first_exit_layer": min(config.first_exit_layer, num_layers - 1),
    }
    return dataclasses.replace(phase, config=AdambaConfig.from_dict(config.to_dict() | changes))


def as_fits(phase: PlannedPhase, memory: float) -> PlannedPhase:
    """With as many layers, in pairs, as `memory` GiB hold by the estimate; never less than one pair."""
    for num_layers in range(phase.config.num_hidden_layers, 2, -2):
        shorter = with_layers(phase, num_layers)
        if sum(memory_gib(shorter).values()) <= memory * USABLE_FRACTION:
            return shorter
    return with_layers(phase, 2)


def measure(phase: PlannedPhase, rated: float, num_steps: int) -> dict:
    """One row of the report; `rated` in FLOPs a second."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    reached = flops_per_second(phase, num_steps)
    estimate = sum(memory_gib(phase).values())
    row = {
        "phase": phase.name,
        "hidden": phase.config.hidden_size,
        "layers": phase.config.num_hidden_layers,
        "length": phase.length,
        "rows": phase.values["per_device_train_batch_size"],
        "tokens_per_second": reached / phase.flops_per_token,
        "flops_per_second": reached,
        "mfu": reached / rated,
        "estimate_gib": estimate,
    }
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2**30
        row |= {"peak_gib": peak, "memory_over_estimate": peak / estimate}
    return row


def plan(family: str, lengths: Iterable[int], memory: float) -> list[PlannedPhase]:
    phases = [phase for phase in read_plan(ROOT / FAMILIES[family]) if phase.name in PHASES]
    return [as_fits(on_one_gpu(phase, length), memory) for phase in phases for length in lengths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, three steps")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu.py: no CUDA device here, nothing measured")
        return
    rated = rated_flops_per_second()
    if not rated:
        sys.exit(f"bench/gpu.py: {torch.cuda.get_device_name()} is not in adamba/gpus.py; enter its rated speed there")
    started, rows = time.monotonic(), []
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    for family in options.families:
        for phase in plan(family, options.lengths, memory):
            phase = with_layers(phase, 2) if options.quick else phase
            rows.append({"family": family} | measure(phase, rated, 3 if options.quick else options.steps))
            print(f"{family} {phase.name} {phase.length}: MFU {rows[-1]['mfu']:.1%}", flush=True)
    write_results("gpu", rows, started, target=TARGET, quick=options.quick, rated_flops_per_second=rated)


if __name__ == "__main__":
    main()
