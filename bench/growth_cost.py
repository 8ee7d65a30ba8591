"""
How the cost grows with length, width, layers, ranks and data: slopes in logarithmic axes, and docs/growth_cost.png.

    python bench/growth_cost.py            # 256 to 16,384 tokens; 3 minutes
    python bench/growth_cost.py --quick    # to 1,024 tokens, no picture

- length: forward + backward of one row: an attention layer (expected: its projections 1, its scores towards 2), a
  Mamba layer (1) and the hybrid, and a decode step after so many tokens (Mamba 0);
- widths and layers: a training step beside its FLOPs (1);
- ranks: a step of two DDP processes over gloo beside one, the same rows a rank (0 but for the gradients' exchange);
- data: rendering, tokenizing and packing of more and more rows (1), and the wait for the first packed row (0).

One run of each alternative in turn, repeated; the slope is that of the least squares line through the logarithms.
"""

import argparse
import math
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from peers import build
from runs import ROOT, write_results
from side_by_side import in_turn
from training_step import step_flops, stepper, token_ids
from transformers import DynamicCache

from adamba.model import AdambaForCausalLM
from adamba.model.layers_adamba import rotations

PICTURE = ROOT / "docs" / "growth_cost.png"
HIDDEN = 128


def slope(costs: Mapping[float, float]) -> float:
    """Of the least squares line through the logarithms: 1 is proportional, 0 constant, 2 square."""
    x, y = [math.log(size) for size in costs], [math.log(cost) for cost in costs.values()]
    return statistics.linear_regression(x, y).slope


def medians(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    return {name: statistics.median(cpu for _, cpu in spent) for name, spent in in_turn(dict(runs), repeats).items()}


def row(axis: str, what: str, costs: Mapping[float, float], expected: str, clock: str = "CPU") -> dict:
    last = dict(list(costs.items())[-2:])
    return {
        "axis": axis,
        "what": what,
        "slope": slope(costs),
        "slope_at_the_end": slope(last),
        "expected": expected,
        "clock": clock,
        "seconds": {str(size): cost for size, cost in costs.items()},
    }


def by_length(lengths: list[int], repeats: int) -> list[dict]:
    model = build("adamba", HIDDEN, 4)
    assert isinstance(model, AdambaForCausalLM)
    attention, mamba = model.model.layers[:2]
    costs: dict[str, dict[float, float]] = {"attention layer": {}, "Mamba layer": {}, "hybrid": {}, "decode step": {}}
    for length in lengths:
        ids = token_ids(model.config.vocab_size, length, length)
        hidden = torch.randn(1, length, HIDDEN)
        rope = rotations(*model.model.rotary_emb(hidden, torch.arange(length)[None]), model.config.rope_sign)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model.eval()(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        model.train()

        def decode(cache=cache, ids=ids) -> None:
            with torch.no_grad():
                for _ in range(8):
                    model(ids[:, :1], past_key_values=cache, use_cache=True)

        runs = {
            "attention layer": lambda x=hidden, rope=rope: attention(x, HIDDEN, rope).sum().backward(),
            "Mamba layer": lambda x=hidden: mamba(x).sum().backward(),
            "hybrid": lambda ids=ids: model(ids, labels=ids, use_cache=False).loss.backward(),
            "decode step": decode,
        }
        for name, seconds in medians(runs, repeats).items():
            costs[name][length] = seconds / 8 if name == "decode step" else seconds
    expected = {"attention layer": "1 to 2", "Mamba layer": "1", "hybrid": "1 to 2", "decode step": "0 to 1"}
    return [row("length", name, values, expected[name]) for name, values in costs.items()]


def by_width(repeats: int) -> list[dict]:
    """Against FLOPs, not channels: Mamba layers stay at full width."""
    hidden = 4 * HIDDEN
    model = build("adamba", hidden, 2)
    ids = token_ids(model.config.vocab_size, 256, 1024)
    widths = list(model.config.width_levels.values())
    spent = medians({str(width): stepper(model, ids, "fp32", width=width) for width in widths}, repeats)
    costs = {step_flops(model.config, width, 256) * ids.numel(): spent[str(width)] for width in widths}
    return [row("FLOPs of a width", "training step", costs, "1")]


def by_layers(counts: list[int], repeats: int) -> list[dict]:
    runs: dict[str, Callable[[], object]] = {}
    for count in counts:
        model = build("adamba", HIDDEN, count)
        runs[str(count)] = stepper(model, token_ids(model.config.vocab_size, 256, 1024), "fp32")
    spent = medians(runs, repeats)
    return [
        row("layers", "training step", {count: spent[str(count)] for count in counts}, "1, less embedding and head")
    ]


def by_rows(counts: list[int], repeats: int) -> list[dict]:
    from adamba.data import load_mixture, materialise, pack_rows, row_texts, train_tokenizer

    rows = materialise(load_mixture({"calculator": 1.0, "tic_tac_toe": 0.5}, split="train", seed=0), max(counts))
    tokenizer = train_tokenizer((text for item in rows.select(range(500)) for text in row_texts(item)), 512)

    def packed(count: int):
        return pack_rows(rows.select(range(count)).to_iterable_dataset(), tokenizer, 512, assistant_only_loss=True)

    every = medians({str(count): lambda count=count: list(packed(count)) for count in counts}, repeats)
    first = medians({str(count): lambda count=count: next(iter(packed(count))) for count in counts}, repeats)
    return [
        row("rows", "pack all", {count: every[str(count)] for count in counts}, "1"),
        row("rows", "first packed row", {count: first[str(count)] for count in counts}, "0"),
    ]


def rank_steps(rank: int, ranks: int, port: int, repeats: int, seconds) -> None:
    """One process of a DDP group: median seconds of a step."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    model = torch.nn.parallel.DistributedDataParallel(build("adamba", 2 * HIDDEN, 4))
    step = stepper(model, token_ids(model.module.config.vocab_size, 256, 1024), "fp32")
    step()
    spent = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        spent.append(time.perf_counter() - started)
    seconds[rank] = statistics.median(spent)
    torch.distributed.destroy_process_group()


def by_ranks(repeats: int) -> list[dict]:
    """By the clock: the ranks wait for one another."""
    costs: dict[float, float] = {}
    for ranks in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        seconds = torch.multiprocessing.get_context("spawn").Manager().dict()
        torch.multiprocessing.spawn(rank_steps, (ranks, port, repeats, seconds), nprocs=ranks)
        costs[ranks] = max(seconds.values())
    return [row("ranks", "step, the same rows a rank", costs, "0 and the exchange of gradients", clock="wall-clock")]


def draw(rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    from adamba.report.style import LIGHT, png, styled

    axes_of = list(dict.fromkeys(item["axis"] for item in rows))
    with styled(LIGHT):
        figure = Figure(figsize=(11, 6.4))
        for number, axis in enumerate(axes_of):
            panel(figure.add_subplot(2, 3, number + 1), [item for item in rows if item["axis"] == axis])
        PICTURE.write_bytes(png(figure))
    print(f"drew {PICTURE.relative_to(ROOT)}")


def panel(axes, rows: list[dict]) -> None:
    """One axis of growth; the slope of each line in its colour, in the order in which the lines end."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    from adamba.report.style import LIGHT

    colors = list(LIGHT.phases.values())[1::2]
    sizes = [float(size) for size in rows[0]["seconds"]]
    lowest = min(min(item["seconds"].values()) for item in rows)
    highest = max(max(item["seconds"].values()) for item in rows)
    ordered = sorted(rows, key=lambda item: -list(item["seconds"].values())[-1])
    for place, (color, item) in enumerate(zip(colors, ordered, strict=False)):
        axes.loglog(sizes, list(item["seconds"].values()), marker="o", color=color)
        text = f"{item['what']}: {item['slope']:.2f}".replace("-", "\N{MINUS SIGN}")
        axes.text(0.03, 0.96 - 0.085 * place, text, transform=axes.transAxes, color=color, va="top", fontsize=9)
    axes.set(title=f"cost against {rows[0]['axis']}", xlabel=rows[0]["axis"], ylabel=f"{rows[0]['clock']} time")
    axes.set_xticks(sizes if len(sizes) < 5 else sizes[::2])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(places=0, sep=" "))
    axes.set_ylim(lowest / 3, highest * 30)  # room for the words
    axes.yaxis.set_major_locator(LogLocator(numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter("s", sep=" "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="to see that it runs")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    started = time.monotonic()
    lengths = [256, 512, 1024] if options.quick else [2**power for power in range(8, 15)]
    rows = by_length(lengths, options.repeats)
    rows += by_width(options.repeats)
    rows += by_layers([2, 4] if options.quick else [2, 4, 8, 16], options.repeats)
    rows += by_rows([500, 1000] if options.quick else [1000, 2000, 4000, 8000], options.repeats)
    rows += by_ranks(options.repeats)
    if not options.quick:
        draw(rows)
    write_results("growth_cost", rows, started, repeats=options.repeats, quick=options.quick)


if __name__ == "__main__":
    main()
