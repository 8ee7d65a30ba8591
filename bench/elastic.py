"""
Is a narrower or shallower run of the same checkpoint really faster, and a slice of it really smaller?

    python bench/elastic.py                                          # 4 layers of 1,024 channels; about 5 minutes
    python bench/elastic.py --quick                                  # 256 channels, to see that it runs
    python bench/elastic.py --checkpoint checkpoints/router/router   # and its agents' episodes, one at a time

Three tables, each in one run with the alternatives in turn, so that what else the machine does hits all of them; CPU
time stands beside the clock's, which other programs disturb:
1. forward and decode time at each width against full width, beside the ratio of their FLOPs (target: at most 1.25 ×);
2. parameters and bytes of each slice, in memory and on disk;
3. episodes at batch 1: full depth against `propagate` at the checkpoint's calibrated threshold (target: decoding 1.3 ×
   faster, at most 1 % of the accuracy) and against `verify` (target: 1.2 × faster, the same text), and `verify` where
   drafts are always rejected (target: at most 5 % slower).
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from peers import adamba_config
from runs import write_results
from side_by_side import against, in_turn
from transformers.generation.streamers import BaseStreamer

from adamba.flops import forward_flops_per_token
from adamba.loading import ModelArguments, load_model_and_tokenizer
from adamba.model import AdambaForCausalLM
from adamba.surgery import slice_width
from adamba.training.evaluation import GameSettings, task_rows
from adamba.training.play import play

TABLES = ["widths", "slices", "episodes"]
FIRST_SEED = 2_000_000  # instances that neither evaluation nor calibration plays


def wide_model(hidden_size: int) -> AdambaForCausalLM:
    torch.manual_seed(0)
    return AdambaForCausalLM(adamba_config(hidden_size, num_layers=4)).eval()


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
            over = {"time_over_flops": row["time_ratio"], "cpu_time_over_flops": row["cpu_time_ratio"]}
            rows.append(row | {key: ratio / flop_ratio for key, ratio in over.items()})
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


class DecodeClock(BaseStreamer):
    """Seconds from a turn's first token to its last: decoding without the prompt's pass."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.tokens = 0
        self.last: tuple[float, float] | None = None

    def put(self, value: torch.Tensor) -> None:
        if value.dim() > 1:  # the prompt
            return
        now = time.perf_counter(), time.process_time()
        if self.last is not None:
            self.wall, self.cpu = self.wall + now[0] - self.last[0], self.cpu + now[1] - self.last[1]
            self.tokens += 1
        self.last = now

    def end(self) -> None:
        self.last = None


def bench_modes(model, tokenizer, rows: list[dict], modes: dict[str, dict], max_new: int) -> list[dict]:
    """Each row's episode in every mode, one at a time, in a new order each; the first one warms up."""
    names, rng = list(modes), random.Random(1)
    totals = {mode: DecodeClock() for mode in names}
    episode_seconds = {mode: [0.0, 0.0] for mode in names}
    drafted, accepted, layers = Counter[str](), Counter[str](), Counter[str]()
    same, scores = Counter[str](), Counter[str]()
    for number, row in enumerate([rows[0], *rows]):
        rng.shuffle(names)
        episodes = {}
        for mode in names:
            clock = totals[mode] if number else DecodeClock()
            options = modes[mode] | {"streamer": clock}
            (episodes[mode],), spent = playing(model, tokenizer, row, options, max_new)
            if number:
                episode_seconds[mode] = [old + new for old, new in zip(episode_seconds[mode], spent, strict=True)]
        if not number:
            continue
        for mode, (episode, traces) in episodes.items():
            same[mode] += episode.messages == episodes["full"][0].messages
            scores[mode] += episode.outcome["score"]
            for trace in traces:
                drafted[mode] += trace.num_drafted
                accepted[mode] += trace.num_accepted
                layers[mode] += int((trace.exit_layers[0, 1:] + 1).sum())
    full, results = totals["full"], []
    for mode in modes:
        own, count = totals[mode], len(rows)
        wall, cpu = episode_seconds[mode]
        results.append(
            {
                "mode": mode,
                "threshold": modes[mode].get("exit_threshold"),
                "prompts": count,
                "score": scores[mode] / count,
                "identical": same[mode],
                "decoded_tokens": own.tokens,
                "mean_layers": layers[mode] / max(own.tokens, 1),
                "drafted": drafted[mode],
                "accepted": accepted[mode],
                # per token, because an episode that differs may be longer
                "decode_speedup": (full.wall / full.tokens) / (own.wall / own.tokens),
                "decode_speedup_cpu_time": (full.cpu / full.tokens) / (own.cpu / own.tokens),
                "episode_speedup": episode_seconds["full"][0] / wall,
                "episode_speedup_cpu_time": episode_seconds["full"][1] / cpu,
            }
        )
    return results


def playing(model, tokenizer, row: dict, options: dict, max_new: int):
    """One episode with the trace of each of its turns, and the seconds that it took."""
    generate, traces = model.generate, []

    def remember(**kwargs):
        output = generate(**kwargs)
        traces.append(model.last_generation)
        return output

    model.generate = remember
    try:
        started, started_cpu = time.perf_counter(), time.process_time()
        episodes = play(model, tokenizer, [row], max_new_tokens=max_new, batch_size=1, generate_kwargs=options)
        spent = time.perf_counter() - started, time.process_time() - started_cpu
    finally:
        model.generate = generate
    return [(episodes[0], traces)], spent


def bench_episodes(path: str, num_prompts: int, tasks: list[str], threshold: float | None, max_new: int) -> list[dict]:
    """Held-out episodes, one at a time: full depth, propagate and verify; and verify where no draft is right."""
    model, tokenizer = load_model_and_tokenizer(ModelArguments(model_name_or_path=path))
    model.eval()
    chosen = getattr(model.generation_config, "exit_threshold", None) if threshold is None else threshold
    if chosen is None:
        raise SystemExit(f"{path}: no exit_threshold; run run_eval.py --calibrate on it first, or give --threshold")
    full = {"exit_threshold": 1.0, "exit_mode": "propagate"}
    verify = {"exit_mode": "verify"}
    propagate = {"exit_threshold": chosen, "exit_mode": "propagate"}
    for key in ("exit_threshold", "exit_mode"):
        setattr(model.generation_config, key, None)
    results = []
    for task in tasks:
        rows = task_rows(task, num_prompts, GameSettings(), FIRST_SEED)
        random.Random(0).shuffle(rows)
        modes = {"full": full, "propagate": propagate, "verify": verify}
        found = bench_modes(model, tokenizer, rows[:num_prompts], modes, max_new)
        results += [{"measure": "episodes", "task": task, **row} for row in found]
    # The same weights' work, but what the last layers write is noise: gates stay sure, and drafts are wrong.
    spoil_last_layers(model)
    rows = task_rows(tasks[0], max(num_prompts // 4, 1), GameSettings(), FIRST_SEED)
    found = bench_modes(model, tokenizer, rows, {"full": full, "verify": verify}, max_new)
    return results + [{"measure": "episodes", "task": f"{tasks[0]}, drafts rejected", **row} for row in found]


@torch.no_grad()
def spoil_last_layers(model: AdambaForCausalLM) -> None:
    generator = torch.Generator().manual_seed(0)
    last = max(index for index, kind in enumerate(model.config.layer_types) if kind != "linear_attention")
    weight = model.model.layers[last].mlp.down_proj.weight
    weight.copy_(torch.randn(weight.shape, generator=generator) * 10 * weight.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--checkpoint", help="an agent whose episodes are played")
    parser.add_argument("--prompts", type=int, default=200, help="episodes of each task")
    parser.add_argument("--tasks", nargs="+", default=["calculator", "tic_tac_toe"])
    parser.add_argument("--threshold", type=float, help="of propagate; default: the checkpoint's calibrated one")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="default: all")
    options = parser.parse_args()
    started = time.monotonic()
    repeats = 3 if options.quick else options.repeats
    rows: list[dict] = []
    if {"widths", "slices"} & {*options.tables}:
        model = wide_model(256 if options.quick else 1024)
        batch, length = (4, 64) if options.quick else (4, 512)
        if "widths" in options.tables:
            rows += bench_widths(model, repeats, batch, length, num_tokens=4 if options.quick else 16)
        if "slices" in options.tables:
            rows += bench_slices(model)
    if options.checkpoint and "episodes" in options.tables:
        rows += bench_episodes(
            options.checkpoint, options.prompts, options.tasks, options.threshold, options.max_new_tokens
        )
    name = "elastic" if len(options.tables) == len(TABLES) else "elastic_" + "_".join(options.tables)
    write_results(
        name,
        rows,
        started,
        repeats=repeats,
        quick=options.quick,
        checkpoint=options.checkpoint,
        target="time at most 1.25 x FLOPs; decoding by propagate 1.3 x, by verify 1.2 x faster than full depth",
    )


if __name__ == "__main__":
    main()
