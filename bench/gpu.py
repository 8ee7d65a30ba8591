"""
What a GPU reaches: MFU of phases 1, 2 and 5, and their memory against the estimate of `run_plan.py`. Needs CUDA.

    pip install -c constraints.txt -e ".[dev,gpu]" && python bench/gpu.py
    python bench/gpu.py --lengths 2048 --quick      # 3 steps, two layers
    python bench/gpu.py --as-in-recipe              # with the recipe's activation checkpointing and compilation
    python bench/gpu.py --steps-of phase3b          # ten steps of that phase by its own script, from random weights

Two models: the SmolLM2 plan (`recipes/smollm2`, 30 attention and 30 Mamba layers of 576 channels and larger), and the
full plan at its own sizes (`recipes`, 2,048 channels and more) with as many layers as the memory estimate lets fit.
bf16 autocast, one GPU, ten micro-batches of 16,384 tokens, of more where a whole model leaves room, in rows of four
documents (forward, backward, a share of the optimizer's step), layers compiled, no activation checkpointing.

MFU is model FLOPs (`adamba/flops.py`: a multiply-add is 2, the causal half of the scores, the scan and its convolution
counted, what checkpointing computes again not) over the rated dense bf16 speed (`adamba/gpus.py`). Scores count over a
row, as is usual; in `mfu_by_document` only inside a document, which is what is computed. Target: above 40 % for the
hybrid, memory within 10 % of the estimate. Published marks: dense 46 to 50 % (nanochat, Fast-LLM on H100), hybrid
Mamba-2 33 to 34 % (NeMo AutoModel).
"""

import argparse
import dataclasses
import gc
import itertools
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from runs import ROOT, WORK, command, metrics_of, write_results

from adamba.budget.calibrate import NUM_DOCUMENTS, flops_per_second
from adamba.budget.memory import memory_gib
from adamba.budget.phases import Launch, PlannedPhase, read_plan
from adamba.data import load_mixture, row_texts, train_tokenizer
from adamba.gpus import rated_flops_per_second
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.model.kernels_adamba import loads

PHASES = ("phase1", "phase2", "phase5")
FAMILIES = {"smollm2": "recipes/smollm2", "full plan": "recipes"}
TOKENS = 16_384  # of a micro-batch
MIX = {"pydoc_topics": 1.0, "calculator": 0.2, "tic_tac_toe": 0.1}  # text that is on every machine
FILLED = 0.85  # of the memory, by the estimate, which may be a tenth off
TARGET = "mfu 0.40; memory_over_estimate 0.9 to 1.1"


def on_one_gpu(phase: PlannedPhase, length: int, tokens: int = TOKENS, as_in_recipe: bool = False) -> PlannedPhase:
    """The phase without sharding, in bf16, at a length; compiled and without checkpointing unless `as_in_recipe`."""
    rows = max(1, tokens // length)
    values = {**phase.values, "max_length": length, "per_device_train_batch_size": rows, "bf16": True}
    if not as_in_recipe:
        values |= {"torch_compile": True, "activation_checkpointing": False, "gradient_checkpointing": False}
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


def fits(phase: PlannedPhase, memory: float) -> bool:
    return sum(memory_gib(phase).values()) <= FILLED * memory


def as_fits(phase: PlannedPhase, memory: float) -> PlannedPhase:
    """
    With as many layers, in pairs, as `FILLED` of `memory` GiB holds by the estimate, never less than one pair. Where
    all do, rows double as long as they fit: with few, a small model waits for the CPU, which launches its kernels.
    """
    all_layers = phase.config.num_hidden_layers
    shorter = (with_layers(phase, num_layers) for num_layers in range(all_layers, 2, -2))
    chosen = next((candidate for candidate in shorter if fits(candidate, memory)), with_layers(phase, 2))
    while chosen.config.num_hidden_layers == all_layers:
        rows = 2 * chosen.values["per_device_train_batch_size"]
        more = dataclasses.replace(chosen, values={**chosen.values, "per_device_train_batch_size": rows})
        if not fits(more, memory):
            break
        chosen = more
    return chosen


def measure(phase: PlannedPhase, rated: float, num_steps: int) -> dict:
    """One row of the report; `rated` in FLOPs a second."""
    cuda = torch.cuda.is_available()
    gc.collect()
    if cuda:
        torch._dynamo.reset()  # what was compiled for the model before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    estimate = memory_gib(phase)
    row = {
        "phase": phase.name,
        "hidden": phase.config.hidden_size,
        "layers": phase.config.num_hidden_layers,
        "length": phase.length,
        "rows": phase.values["per_device_train_batch_size"],
        "compiled": bool(phase.values.get("torch_compile")),
        "checkpointing": phase.checkpoints_activations,
        "estimate_gib": sum(estimate.values()),
        "estimate_parts": {name: round(value, 2) for name, value in estimate.items()},
    }
    try:
        reached = flops_per_second(phase, num_steps)
    except torch.OutOfMemoryError:
        return row | {"mfu": 0.0, "out_of_memory": True}
    row |= {"tokens_per_second": reached / phase.flops_per_token, "flops_per_second": reached, "mfu": reached / rated}
    document = dataclasses.replace(phase, values={**phase.values, "max_length": phase.length // NUM_DOCUMENTS})
    row["mfu_by_document"] = row["mfu"] * document.flops_per_token / phase.flops_per_token
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2**30
        row |= {"peak_gib": peak, "memory_over_estimate": peak / row["estimate_gib"]}
    return row


def plan(
    family: str, names: Iterable[str], lengths: Iterable[int], memory: float, as_in_recipe: bool
) -> list[PlannedPhase]:
    phases = [phase for phase in read_plan(ROOT / FAMILIES[family]) if phase.name in names]
    return [as_fits(on_one_gpu(p, length, TOKENS, as_in_recipe), memory) for p in phases for length in lengths]


def random_start(phase: PlannedPhase, folder: Path) -> None:
    """A checkpoint of the phase's size with random weights and a small tokenizer, for want of the phases before it."""
    with torch.device("cuda"):
        model = AdambaForCausalLM(phase.config).to(torch.bfloat16)
    model.save_pretrained(folder)
    rows = itertools.islice(load_mixture(MIX, split="train", seed=0), 1000)
    train_tokenizer((text for row in rows for text in row_texts(row)), 2048).save_pretrained(folder)


def real_steps(name: str) -> dict:
    """
    Ten steps of a phase of the full plan by its own script and recipe, from random weights, on text at hand; four
    micro-batches a step. Whether it runs, and in what memory: most of its seconds are compiling and trying kernels.
    """
    phase = next(phase for phase in read_plan(ROOT / FAMILIES["full plan"]) if phase.name == name)
    start, output = WORK / f"{name}_start", WORK / f"{name}_steps"
    random_start(phase, start)
    gc.collect()
    torch.cuda.empty_cache()
    mix = ",".join(f"{source}={weight}" for source, weight in MIX.items())
    options = {"model_name_or_path": start, "output_dir": output, "mix": mix, "max_steps": 10, "save_strategy": "no"}
    options |= {"gradient_accumulation_steps": 4, "logging_steps": 1}
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    command(phase.script, f"recipes/{name}.yaml", *words, before=["python"])
    metrics = metrics_of(output)
    estimate = sum(memory_gib(dataclasses.replace(phase, launch=Launch())).values())
    shown = ("train_loss", "train_steps", "train_seconds", "peak_gpu_memory_bytes")
    return {"phase": name, "estimate_gib": estimate} | {key: metrics[key] for key in shown if key in metrics}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, three steps")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--phases", nargs="+", default=list(PHASES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--as-in-recipe", action="store_true", help="checkpointing and compilation as there")
    parser.add_argument("--steps-of", metavar="PHASE", help="ten steps of this phase, by its own script")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu.py: no CUDA device here, nothing measured")
        return
    rated = rated_flops_per_second()
    if not rated:
        sys.exit(f"bench/gpu.py: {torch.cuda.get_device_name()} is not in adamba/gpus.py; enter its rated speed there")
    started, rows = time.monotonic(), []
    facts = {package: loads(package) for package in ("mamba_ssm", "causal_conv1d")}
    if options.steps_of:
        write_results(f"gpu_{options.steps_of}", [real_steps(options.steps_of)], started, **facts)
        return
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    facts |= {"target": TARGET, "quick": options.quick, "rated_flops_per_second": rated}
    for family in options.families:
        for phase in plan(family, options.phases, options.lengths, memory, options.as_in_recipe):
            phase = with_layers(phase, 2) if options.quick else phase
            rows.append({"family": family} | measure(phase, rated, 3 if options.quick else options.steps))
            print(f"{family} {phase.name} {phase.length}: MFU {rows[-1]['mfu']:.1%}", flush=True)
            own = [row for row in rows if row["family"] == family]
            name = f"gpu_{family.replace(' ', '_')}" + "_as_in_recipe" * options.as_in_recipe
            write_results(name, own, started, **facts)


if __name__ == "__main__":
    main()
