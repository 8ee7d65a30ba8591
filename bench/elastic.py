"""
Is a narrower or shallower run of the same checkpoint really faster, and a slice of it really smaller?

    python bench/elastic.py                                          # 4 layers of 1,024 channels; about 5 minutes
    python bench/elastic.py --quick                                  # 256 channels, to see that it runs
    python bench/elastic.py --checkpoint checkpoints/tiny/phase5     # and its agents' episodes, one at a time

Three tables, each in one run with the alternatives in turn, so that what else the machine does hits all of them:
1. forward and decode time at each width against full width, beside the ratio of their FLOPs (target: at most 1.25 ×);
2. parameters and bytes of each slice, in memory and on disk;
3. episodes at batch 1: full depth against `propagate` at the checkpoint's calibrated threshold (target: 1.3 × faster,
   at most 1 % of the accuracy) and against `verify` (target: 1.2 × faster, the same text).
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from runs import write_results

from adamba.flops import forward_flops_per_token
from adamba.loading import ModelArguments, load_model_and_tokenizer
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.surgery import slice_width
from adamba.training.evaluation import GameSettings, task_rows
from adamba.training.play import play

FIRST_SEED = 2_000_000  # instances that neither evaluation nor calibration plays


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turn(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, every repeat running all of them in a new order; one round before counts for nothing."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, rng = list(runs), random.Random(0)
    for repeat in range(repeats + 1):
        rng.shuffle(order)
        for name in order:
            spent = timed(runs[name])
            if repeat:
                seconds[name].append(spent)
    return seconds


def against(seconds: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
    """Median and spread of the ratio within one repeat."""
    ratios = [own / other for own, other in zip(seconds[name], seconds[base], strict=True)]
    return {
        "median_seconds": statistics.median(seconds[name]),
        "time_ratio": statistics.median(ratios),
        "time_ratio_min": min(ratios),
        "time_ratio_max": max(ratios),
    }


def wide_model(hidden_size: int) -> AdambaForCausalLM:
    heads = hidden_size // 64
    config = AdambaConfig(
        vocab_size=1024,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        max_position_embeddings=4096,
        pad_token_id=0,
        width_levels={str(hidden_size * part // 4): hidden_size * part // 4 for part in (1, 2, 3, 4)},
    )
    torch.manual_seed(0)
    return AdambaForCausalLM(config).eval()


@torch.no_grad()
def bench_widths(model: AdambaForCausalLM, repeats: int, batch: int, length: int, num_tokens: int) -> list[dict]:
    """Forward of batch × length tokens, and `num_tokens` cached steps of `batch` rows after a prompt of `length`."""
    config, full = model.config, str(model.config.hidden_size)
    ids = torch.randint(1, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))

    def decode(width: int) -> Callable[[], object]:
        cache = model(ids, use_cache=True, width=width, logits_to_keep=1).past_key_values

        def run() -> None:
            for place in range(num_tokens):
                model(ids[:, place : place + 1], past_key_values=cache, use_cache=True, width=width)

        return run

    def forward(width: int) -> Callable[[], object]:
        return lambda: model(ids, use_cache=False, width=width)

    rows = []
    for what, make, context in (("forward", forward, length), ("decode", decode, 2 * length)):
        seconds = in_turn({name: make(width) for name, width in config.width_levels.items()}, repeats)
        whole = forward_flops_per_token(config, None, context)
        for name, width in config.width_levels.items():
            flop_ratio = forward_flops_per_token(config, width, context) / whole
            row = {"measure": what, "width": width, "batch": batch, "length": length, "flop_ratio": flop_ratio}
            row |= against(seconds, name, full)
            rows.append(row | {"time_over_flops": row["time_ratio"] / flop_ratio})
    return rows


def bench_slices(model: AdambaForCausalLM) -> list[dict]:
    rows = []
    for width in model.config.width_levels.values():
        small = slice_width(model, width)
        with tempfile.TemporaryDirectory() as folder:
            small.save_pretrained(folder)
            on_disk = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        in_memory = sum(parameter.numel() * parameter.element_size() for parameter in small.parameters())
        parameters = small.num_parameters()
        rows.append(
            {
                "measure": "slice",
                "width": width,
                "parameters": parameters,
                "parameter_ratio": parameters / model.num_parameters(),
                "bytes_in_memory": in_memory,
                "bytes_on_disk": on_disk,
                "bytes_per_parameter_on_disk": on_disk / parameters,
            }
        )
    return rows


def bench_episodes(path: str, num_prompts: int, tasks: list[str], threshold: float | None, max_new: int) -> list[dict]:
    """Held-out episodes, one at a time: full depth, propagate and verify, in turn."""
    model, tokenizer = load_model_and_tokenizer(ModelArguments(model_name_or_path=path))
    model.eval()
    chosen = getattr(model.generation_config, "exit_threshold", None) if threshold is None else threshold
    if chosen is None:
        raise SystemExit(f"{path}: no exit_threshold; run run_eval.py --calibrate on it first, or give --threshold")
    modes: dict[str, dict] = {
        "full": {"exit_threshold": 1.0, "exit_mode": "propagate"},
        "propagate": {"exit_threshold": chosen, "exit_mode": "propagate"},
        "verify": {"exit_mode": "verify"},
    }
    model.generation_config.exit_threshold = None
    results = []
    for task in tasks:
        rows = task_rows(task, num_prompts, GameSettings(), FIRST_SEED)
        random.Random(0).shuffle(rows)
        seconds: dict[str, list[float]] = {mode: [] for mode in modes}
        same, scores = dict.fromkeys(modes, 0), dict.fromkeys(modes, 0.0)
        order, rng = list(modes), random.Random(1)
        for number, row in enumerate([rows[0], *rows[:num_prompts]]):
            rng.shuffle(order)
            episodes, spent = {}, {}
            for mode in order:
                started = time.perf_counter()
                options = {"max_new_tokens": max_new, "batch_size": 1, "generate_kwargs": modes[mode]}
                episodes[mode] = play(model, tokenizer, [row], **options)[0]
                spent[mode] = time.perf_counter() - started
            if number == 0:  # it warmed up
                continue
            for mode, episode in episodes.items():
                seconds[mode].append(spent[mode])
                same[mode] += episode.messages == episodes["full"].messages
                scores[mode] += episode.outcome["score"]
        count = len(seconds["full"])
        for mode in modes:
            ratio = against(seconds, mode, "full")
            results.append(
                {
                    "measure": "episodes",
                    "task": task,
                    "mode": mode,
                    "threshold": chosen if mode == "propagate" else None,
                    "prompts": count,
                    "score": scores[mode] / count,
                    "identical": same[mode],
                    "speedup_total": sum(seconds["full"]) / sum(seconds[mode]),
                    "speedup_median": 1 / ratio["time_ratio"],
                    "speedup_min": 1 / ratio["time_ratio_max"],
                    "speedup_max": 1 / ratio["time_ratio_min"],
                }
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--checkpoint", help="an agent whose episodes are played")
    parser.add_argument("--prompts", type=int, default=200, help="episodes of each task")
    parser.add_argument("--tasks", nargs="+", default=["calculator", "tic_tac_toe"])
    parser.add_argument("--threshold", type=float, help="of propagate; default: the checkpoint's calibrated one")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    options = parser.parse_args()
    started = time.monotonic()
    model = wide_model(256 if options.quick else 1024)
    repeats = 3 if options.quick else options.repeats
    batch, length = (4, 64) if options.quick else (4, 512)
    rows = bench_widths(model, repeats, batch, length, num_tokens=4 if options.quick else 16)
    rows += bench_slices(model)
    if options.checkpoint:
        rows += bench_episodes(
            options.checkpoint, options.prompts, options.tasks, options.threshold, options.max_new_tokens
        )
    write_results(
        "elastic",
        rows,
        started,
        repeats=repeats,
        quick=options.quick,
        checkpoint=options.checkpoint,
        target="time at most 1.25 x FLOPs; propagate 1.3 x, verify 1.2 x faster than full depth",
    )


if __name__ == "__main__":
    main()
