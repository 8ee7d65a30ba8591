"""
Has anything become slower? A few ratios to peers, measured small, against the stored ones.

    make bench-quick                      # under 3 minutes; exit code 1 if a ratio fell beyond the noise
    python bench/quick.py --store         # after a change that is meant: 3 rounds, written to bench/results/quick.json

Ratios within one run, of CPU time, carry over between machines far better than seconds; higher is better in all. The
noise is the spread of the rounds of `--store`: a ratio may fall by 3 standard deviations of a new round around the
mean of the stored ones, and by 7 % in any case. What fell further is measured again, and counts if it stays there.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from runs import RESULTS, write_results

ROUNDS = 3
STANDARD_DEVIATIONS = 3
LEAST_FALL = 0.07  # of which no less is called a regression


def mamba() -> dict[str, float]:
    """The plain torch Mamba-2 path at length 2,048, and a decode step."""
    from mamba import bench_decode, bench_length

    measured = bench_length(256, 2048, "path", 5, with_memory=False)
    rows = {row["measure"]: row for row in measured if row["other"].endswith("64")}
    (decode,) = bench_decode(256, 8, 9)
    return {
        "mamba_training": rows["training"]["speedup_cpu_time"],
        "mamba_forward": rows["forward"]["speedup_cpu_time"],
        "mamba_decode": decode["speedup_cpu_time"],
    }


def training_step() -> dict[str, float]:
    """A training step against transformers' hybrids; full width against its twin; a narrow step against its FLOPs."""
    from training_step import Case, bench_elastic, bench_peers

    case = Case(128, 256, "fp32")
    rows = bench_peers(case, 3, with_memory=False)
    peers = {row["other"]: row for row in rows if row["measure"] == "peers"}
    twin, narrow = bench_elastic(case, 5)
    return {f"step_{other}": row["speedup_cpu_time"] for other, row in peers.items()} | {
        "full_width": 1 / twin["cpu_time_ratio"],
        "narrow_step": 1 / narrow["cpu_time_over_flops"],
    }


def decoding() -> dict[str, float]:
    """`generate` at 8 rows against transformers' hybrids."""
    from decoding import bench_peers

    rows = [row for row in bench_peers(128, 8, 32, 16, 3) if row["measure"] == "decoding"]
    return {f"decode_{row['side']}_over_{row['other']}".replace(" ", "_"): row["speedup_cpu_time"] for row in rows}


def start_up() -> dict[str, float]:
    """CPU time of `import torch` over that of a `run_sft.py --help` not kept, which imports all that a run does."""
    from start_up import fresh_help, spent

    ratios = [spent([sys.executable, "-c", "import torch"])[1] / fresh_help()[1] for _ in range(3)]
    return {"start_up": statistics.median(ratios)}


GROUPS: dict[str, Callable[[], dict[str, float]]] = {
    "mamba": mamba,
    "training_step": training_step,
    "decoding": decoding,
    "start_up": start_up,
}


def summarise(case: str, group: str, ratios: list[float]) -> dict:
    """Geometric mean of some rounds, and how the logarithm spreads over them."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = math.exp(statistics.mean(logs))
    return {"case": case, "group": group, "ratio": mean, "log_deviation": statistics.stdev(logs), "rounds": len(logs)}


def lowest_allowed(stored: Mapping) -> float:
    """The ratio below which a case is slower than noise explains."""
    deviation = stored["log_deviation"] * math.sqrt(1 + 1 / stored["rounds"])
    return stored["ratio"] * min(math.exp(-STANDARD_DEVIATIONS * deviation), 1 - LEAST_FALL)


def regressions(stored: Mapping[str, Mapping], measured: Mapping[str, float]) -> dict[str, str]:
    """Case -> what is wrong with it: a ratio below its noise, or one that has nothing to be compared with."""
    wrong = {}
    for case in sorted({*stored, *measured}):
        if case not in stored:
            wrong[case] = "is not in bench/results/quick.json; store it with `python bench/quick.py --store`"
        elif case not in measured:
            wrong[case] = "is stored but was not measured; store anew with `python bench/quick.py --store`"
        elif not measured[case] >= lowest_allowed(stored[case]):
            was, least = stored[case]["ratio"], lowest_allowed(stored[case])
            wrong[case] = f"{measured[case]:.3f}, was {was:.3f}, noise reaches down to {least:.3f}"
    return wrong


def store(groups: list[str]) -> None:
    started = time.monotonic()
    ratios: dict[tuple[str, str], list[float]] = {}
    for number in range(ROUNDS):
        for group in groups:
            for case, ratio in GROUPS[group]().items():
                ratios.setdefault((group, case), []).append(ratio)
        print(f"round {number + 1} of {ROUNDS}: {time.monotonic() - started:.0f} s", flush=True)
    rows = [summarise(case, group, values) for (group, case), values in ratios.items()]
    noise = f"{STANDARD_DEVIATIONS} standard deviations of the logarithm over the rounds, at least {LEAST_FALL:.0%}"
    write_results("quick", rows, started, higher_is="better", noise=noise)


def check(groups: list[str]) -> int:
    """Measure, print a table, and say what is slower. Returns the exit code."""
    path, started = RESULTS / "quick.json", time.monotonic()
    if not path.is_file():
        sys.exit(
            "bench/results/quick.json: nothing is stored yet; run `python bench/quick.py --store` on a quiet machine"
        )
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    stored = {row["case"]: row for row in rows if row["group"] in groups}
    group_of = {row["case"]: row["group"] for row in rows}
    measured = {case: ratio for group in groups for case, ratio in GROUPS[group]().items()}
    wrong = regressions(stored, measured)
    for group in {group_of[case] for case in wrong if case in group_of and case in measured}:
        print(f"{group}: below the noise, measured again", flush=True)
        again = GROUPS[group]()
        measured |= {case: max(ratio, measured[case]) for case, ratio in again.items()}
    wrong = regressions(stored, measured)
    for case, ratio in measured.items():
        was = f"{stored[case]['ratio']:6.2f}  at least {lowest_allowed(stored[case]):6.2f}" if case in stored else ""
        print(f"{case:40} {ratio:6.2f}  stored {was}")
    for case, what in wrong.items():
        print(f"slower: {case}: {what}")
    print(f"{len(measured) - len(wrong)} of {len(measured)} ratios hold, {time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="write the ratios instead of comparing with them")
    parser.add_argument("--quick", action="store_true", help="nothing: this bench is always quick")
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # more threads share memory and caches in other ways
    if options.store:
        if set(options.groups) != set(GROUPS):
            parser.error("--store needs all groups")
        store(options.groups)
    else:
        sys.exit(check(options.groups))


if __name__ == "__main__":
    main()
