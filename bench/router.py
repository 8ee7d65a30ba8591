"""
Does the width router beat every fixed width? Accuracy per FLOP of `width="auto"` on easy and hard prompts.

    python bench/router.py                                          # after `make demo`; 20 minutes, mostly training
    python bench/router.py --checkpoint checkpoints/router/router   # one that is there already
    python bench/router.py --exits --checkpoint checkpoints/tiny/phase5   # only where tokens leave; half a minute

The agent is phase 5 of the tiny family, trained on until its narrow widths call tools too
(`recipes/router/agent.yaml`), then its router alone (`recipes/router/router.yaml`). Three kinds of held-out prompts,
each a third: one-call questions (one operator), deep expressions, games of tic-tac-toe against the perfect opponent.
FLOPs are those of a token at the widths of its turn, over all tokens of all turns, prompts included. Target: the
router's point lies above the line between the fixed widths' points; its mean width on easy prompts is well under that
on hard ones. Two more tables: after which layers the tokens of each kind leave at the checkpoint's exit threshold, and
why all layers get one width (the quality of assignments that mix levels).
"""

import argparse
import itertools
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from runs import command, write_results

from adamba.data import load_mixture
from adamba.data.packing import tokenize_rows
from adamba.flops import forward_flops_per_token
from adamba.loading import ModelArguments, load_model_and_tokenizer
from adamba.model import AdambaForCausalLM
from adamba.training.evaluation import GameSettings, task_rows
from adamba.training.play import play
from adamba.training.routing import draw_turn, qualities
from adamba.training.sft import RowCollator

FIRST_SEED = 3_000_000  # instances that nothing else plays
CONTEXT = 128  # tokens that attention sees, for the FLOPs
DEPTHS = {"one_call": 1, "deep": 3}  # operators above one another


def prompts(count: int) -> dict[str, list[dict]]:
    """Held-out rows of each kind."""
    rows = {}
    for kind, depth in DEPTHS.items():
        settings = {"calculator": {"min_depth": depth, "max_depth": depth}}
        rows[kind] = task_rows("calculator", count, GameSettings(settings=settings), FIRST_SEED)
    rows["game"] = task_rows("tic_tac_toe", count, GameSettings(opponents=("perfect",)), FIRST_SEED)
    rows["game"] = [row for pair in zip(*_halves(rows["game"]), strict=True) for row in pair][:count]
    return rows


def _halves(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


class Meter:
    """Counts what `generate` used: tokens, and their FLOPs and widths."""

    def __init__(self, model: AdambaForCausalLM) -> None:
        self.model, self.generate = model, model.generate
        self.tokens = self.flops = self.width = 0.0
        model.generate = self.run

    def run(self, input_ids, **kwargs):
        output = self.generate(input_ids=input_ids, **kwargs)
        new = output[:, input_ids.shape[1] :]
        counts = (kwargs["attention_mask"].sum(1) + (new != kwargs["pad_token_id"]).sum(1)).tolist()
        widths = self.model.last_generation.widths
        rows = widths if isinstance(widths[0], list) else [widths] * len(counts)
        for count, row in zip(counts, rows, strict=True):
            self.tokens += count
            self.flops += count * forward_flops_per_token(self.model.config, row, CONTEXT)
            self.width += count * sum(row) / len(row)
        return output

    def stop(self) -> None:
        self.model.generate = self.generate


def measure(model, tokenizer, rows: list[dict], max_new_tokens: int, width) -> dict[str, float]:
    meter = Meter(model)
    try:
        options = {"max_new_tokens": max_new_tokens, "generate_kwargs": {"width": width}}
        episodes = play(model, tokenizer, rows, **options)
    finally:
        meter.stop()
    return {
        "score": sum(episode.outcome["score"] for episode in episodes) / len(episodes),
        "flops_per_token": meter.flops / meter.tokens,
        "mean_width": meter.width / meter.tokens,
        "tokens": meter.tokens,
    }


def bench_exits(model: AdambaForCausalLM, tokenizer, kinds: dict[str, list[dict]], max_new: int, threshold: float):
    """Share of each kind's tokens that leave after each layer, without the first of a turn (the prompt's pass)."""
    generate, rows = model.generate, []
    for kind, prompt_rows in kinds.items():
        left: Counter[int] = Counter()

        def count(input_ids, left=left, **kwargs):
            output = generate(input_ids=input_ids, **kwargs)
            new = output[:, input_ids.shape[1] + 1 :]
            left.update(model.last_generation.exit_layers[:, 1:][new != kwargs["pad_token_id"]].tolist())
            return output

        model.generate = count
        options = {"max_new_tokens": max_new, "generate_kwargs": {"exit_threshold": threshold}}
        episodes = play(model, tokenizer, prompt_rows, **options)
        model.generate = generate
        total = left.total()
        row = {"prompts": kind, "exit_threshold": threshold, "episodes": len(episodes)}
        row["score"] = sum(episode.outcome["score"] for episode in episodes) / len(episodes)
        row |= {f"left_after_layer_{layer}": left[layer] / total for layer in [*model.config.gate_layers]}
        row["full_depth"] = left[model.config.num_hidden_layers - 1] / total
        rows.append(row | {"mean_layers": sum((layer + 1) * n for layer, n in left.items()) / total})
    return rows


def line_at(points: list[tuple[float, float]], flops: float) -> float:
    """The best that two fixed widths, mixed at random, score at so many FLOPs."""
    best = max((score for cost, score in points if cost <= flops), default=0.0)
    for (x0, y0), (x1, y1) in itertools.combinations(sorted(points), 2):
        if x0 <= flops <= x1 and x0 < x1:
            best = max(best, y0 + (y1 - y0) * (flops - x0) / (x1 - x0))
    return best


def bench_mixes(model: AdambaForCausalLM, tokenizer, count: int) -> list[dict]:
    """Quality (as the router learns it) of every assignment of a level to each layer, on held-out turns."""
    names = list(model.config.width_levels)
    tried = list(itertools.product(names, repeat=model.config.num_attention_layers))
    rng, kept, costs = random.Random(0), [], []
    for source in ("calculator", "tic_tac_toe"):
        stream = load_mixture({source: 1.0}, split="test", seed=0)
        rows = list(itertools.islice(tokenize_rows(stream, tokenizer, 512, assistant_only_loss=True), count))
        batch = RowCollator([source], tokenizer.pad_token_id)(rows)
        labels, _ = batch.pop("labels"), batch.pop("source_id")
        kept.append(qualities(model, batch, labels, draw_turn(labels, rng)[1], [list(mix) for mix in tried]))
    full = forward_flops_per_token(model.config, None, CONTEXT)
    costs = [forward_flops_per_token(model.config, list(mix), CONTEXT) / full for mix in tried]
    means = torch.cat(kept).mean(0).tolist()
    uniform = {
        names.index(mix[0]): (cost, mean)
        for mix, cost, mean in zip(tried, costs, means, strict=True)
        if len({*mix}) == 1
    }
    above = sum(
        mean > line_at(list(uniform.values()), cost) + 1e-6
        for mix, cost, mean in zip(tried, costs, means, strict=True)
        if len({*mix}) > 1
    )
    rows = [
        {"prompts": "mix of levels", "levels": "all equal", "level": names[level], "cost": cost, "quality": mean}
        for level, (cost, mean) in uniform.items()
    ]
    return [
        *rows,
        {
            "prompts": "mix of levels",
            "levels": "mixed",
            "assignments": len(tried) - len(names),
            "above_the_line_of_equal_ones": above,
            "best_quality_at_half_cost_or_less": max(
                mean for mix, cost, mean in zip(tried, costs, means, strict=True) if len({*mix}) > 1 and cost <= 0.5
            ),
        },
    ]


def load(path: str):
    """Model, tokenizer and exit threshold, of which the model itself is freed: widths are measured at full depth."""
    model, tokenizer = load_model_and_tokenizer(ModelArguments(model_name_or_path=path))
    model.eval()
    threshold = getattr(model.generation_config, "exit_threshold", None) or 0.95
    model.generation_config.exit_threshold = None
    return model, tokenizer, threshold


def bench(path: str, count: int, max_new_tokens: int) -> list[dict]:
    model, tokenizer, threshold = load(path)
    kinds = prompts(count)
    results: list[dict] = []
    points = []
    for width in (*model.config.width_levels, "auto"):
        found = {kind: measure(model, tokenizer, rows, max_new_tokens, width) for kind, rows in kinds.items()}
        for kind, row in found.items():
            results.append({"width": width, "prompts": kind, "episodes": count, **row})
        whole = {
            "score": sum(row["score"] for row in found.values()) / len(found),
            # each kind as heavy as the others, however many tokens it takes
            "flops_per_token": sum(row["flops_per_token"] for row in found.values()) / len(found),
            "mean_width": sum(row["mean_width"] for row in found.values()) / len(found),
        }
        results.append({"width": width, "prompts": "all", "episodes": count * len(found), **whole})
        if width != "auto":
            points.append((whole["flops_per_token"], whole["score"]))
        else:
            results[-1]["fixed_widths_score_at_these_flops"] = line_at(points, whole["flops_per_token"])
    results += bench_exits(model, tokenizer, kinds, max_new_tokens, threshold)
    return results + bench_mixes(model, tokenizer, 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", help="an agent with a trained router; default: train it from the tiny family's"
    )
    parser.add_argument("--exits", action="store_true", help="only after which layers tokens leave; no router needed")
    parser.add_argument("--prompts", type=int, default=200, help="of each kind")
    parser.add_argument("--max-new-tokens", type=int, default=80)
    options = parser.parse_args()
    started = time.monotonic()
    said = " ".join(["python bench/router.py", *sys.argv[1:]])
    checkpoint = options.checkpoint
    if options.exits:
        model, tokenizer, threshold = load(checkpoint or "checkpoints/tiny/phase5")
        rows = bench_exits(model, tokenizer, prompts(options.prompts), options.max_new_tokens, threshold)
        write_results("exits", rows, started, command=said, target="easy questions leave early, hard ones late")
        return
    if checkpoint is None:
        for name in ("agent", "router"):
            command("run_sft.py", f"recipes/router/{name}.yaml", "--disable_tqdm", "true")
        checkpoint = "checkpoints/router/router"
    rows = bench(checkpoint, options.prompts, options.max_new_tokens)
    target = "auto above the line between the fixed widths, narrower where easy"
    write_results("router", rows, started, command=said, target=target)


if __name__ == "__main__":
    main()
