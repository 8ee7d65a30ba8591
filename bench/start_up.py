"""
What a command costs before it works: `run_sft.py --help`, and the first optimizer step of a tiny recipe.

    python bench/start_up.py            # 5 times each
    python bench/start_up.py --quick    # once

Seconds on the clock and of CPU time, in processes of their own, and which large libraries `--help` imports. A `--help`
prints the text that `make setup` kept; one that finds none (the code or a package has changed) imports what it lists
and keeps its text. The first step is the first line of the log of `recipes/agents/calculator.yaml`, which starts from
nothing: tokenizer, model, data and one step of 8 rows of 512 tokens. Targets: under 3 s and under 15 s.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from runs import ROOT, write_results

HELP_SECONDS, FIRST_STEP_SECONDS = 3, 15  # targets
LARGE = ("torch", "transformers", "trl", "datasets", "peft", "accelerate", "pandas", "numpy", "matplotlib")
IMPORTED = """
import runpy, sys
sys.argv = ["src/run_sft.py", "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    pass
print("IMPORTED", len(sys.modules), *sys.modules)
"""


def environment(cache: str | None = None) -> dict[str, str]:
    """This one, without a network; `cache` is the folder where the help is kept, if not the user's."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    # Byte code is kept between runs, as `make` does; the first run of all compiles, and is not counted.
    kept = {} if cache is None else {"XDG_CACHE_HOME": cache}
    return os.environ | offline | {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": ""} | kept


def spent(words: list[str], until: str | None = None, cache: str | None = None) -> tuple[float, float]:
    """Seconds and CPU seconds of a command, or seconds up to its first line that contains `until`."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seen, lines = None, []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if until is not None and seen is None and until in line:
            seen = time.perf_counter() - started
    if process.wait() or (until is not None and seen is None):
        sys.exit(f"{' '.join(words)} failed:\n{''.join(lines[-20:])}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started if seen is None else seen, cpu


def summary(measure: str, runs: Sequence[tuple[float, float]], target: float | None = None) -> dict:
    seconds, cpu = zip(*runs, strict=True)
    row = {"measure": measure, "runs": len(runs), "seconds": statistics.median(seconds)}
    row |= {"lowest": min(seconds), "highest": max(seconds), "cpu_seconds": statistics.median(cpu)}
    return row if target is None else row | {"target": target}


HELP = [sys.executable, "src/run_sft.py", "--help"]


def fresh_help() -> tuple[float, float]:
    """`--help` where no text is kept."""
    with tempfile.TemporaryDirectory() as cache:
        return spent(HELP, cache=cache)


def kept_help() -> tuple[tuple[float, float], tuple[float, float]]:
    """Keeping the texts of all scripts as `make setup` does, and `--help` after it."""
    keeping = [sys.executable, "-m", "adamba.kept_help", *map(str, sorted(ROOT.glob("src/run_*.py")))]
    with tempfile.TemporaryDirectory() as cache:
        return spent(keeping, cache=cache), spent(HELP, cache=cache)


def first_step(folder: str) -> tuple[float, float]:
    small = ["--max_steps", "1", "--logging_steps", "1", "--save_strategy", "no", "--num_eval_rows", "1"]
    words = [sys.executable, "src/run_sft.py", "recipes/agents/calculator.yaml", "--output_dir", f"{folder}/out"]
    return spent([*words, *small], until="'loss'")


def imported_by_help() -> dict:
    words = [sys.executable, "-c", IMPORTED]
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(words, cwd=ROOT, env=environment(cache), capture_output=True, text=True, check=True)
    _, count, *names = done.stdout.splitlines()[-1].split()
    large = {name: sum(module.partition(".")[0] == name for module in names) for name in LARGE}
    return {"measure": "modules imported where nothing is kept", "modules": int(count)} | large


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="once each")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    started = time.monotonic()
    repeats = range(1 if options.quick else options.repeats)
    fresh_help()  # the disk's cache
    fresh, kept, floors, steps = [], [], [], []
    for _ in repeats:  # in turn
        fresh.append(fresh_help())
        kept.append(kept_help())
        floors.append(spent([sys.executable, "-c", "from transformers import TrainingArguments"]))
        with tempfile.TemporaryDirectory() as folder:
            steps.append(first_step(folder))
    keeping, after = zip(*kept, strict=True)
    rows = [
        summary("run_sft.py --help after make setup", after, HELP_SECONDS),
        summary("run_sft.py --help where nothing is kept", fresh),
        summary("make setup keeps the help of all scripts", keeping),
        summary("first optimizer step", steps, FIRST_STEP_SECONDS),
        summary("import of TrainingArguments, whose fields --help lists", floors),
        imported_by_help(),
    ]
    write_results("start_up", rows, started)


if __name__ == "__main__":
    main()
