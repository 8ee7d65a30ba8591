"""
What measurements of speed share: alternatives timed in turn in one process, so that what else the machine does hits
all of them, and the memory of each in a process of its own.
"""

import ctypes
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# CPU time also counts threads that wait for others, and with one thread it tells what else the machine does apart.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)

Spent = tuple[float, float]  # seconds on the clock, and of this process's CPU time


def timed(run: Callable[[], object]) -> Spent:
    started, started_cpu = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_initialized():  # what was asked of a GPU goes on after the call
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - started_cpu


def in_turn(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[Spent]]:
    """What each took, every repeat running all of them in a new order; one round before counts for nothing.

    What exists beforehand is not searched for garbage meanwhile: with all libraries imported that takes a quarter of a
    second, from which one of the sides would suffer by chance.
    """
    seconds: dict[str, list[Spent]] = {name: [] for name in runs}
    order, rng = list(runs), random.Random(0)
    gc.collect()
    gc.freeze()
    try:
        for repeat in range(repeats + 1):
            rng.shuffle(order)
            for name in order:
                spent = timed(runs[name])
                if repeat:
                    seconds[name].append(spent)
    finally:
        gc.unfreeze()
    return seconds


def against(seconds: dict[str, list[Spent]], name: str, base: str) -> dict[str, float]:
    """Median and quartiles of the ratio within one repeat, of wall-clock time and of CPU time."""
    pairs = list(zip(seconds[name], seconds[base], strict=True))
    wall, cpu = ([own[kind] / other[kind] for own, other in pairs] for kind in (0, 1))
    low, _, high = statistics.quantiles(wall, n=4) if len(wall) > 1 else (wall[0], wall[0], wall[0])
    return {
        "median_seconds": statistics.median(own[0] for own, _ in pairs),
        "time_ratio": statistics.median(wall),
        "time_ratio_quartile_1": low,
        "time_ratio_quartile_3": high,
        "cpu_time_ratio": statistics.median(cpu),
    }


def speedup(seconds: dict[str, list[Spent]], own: str, other: str) -> dict[str, float]:
    """How many times as fast `own` is as `other`: median and quartiles within one repeat, and by CPU time."""
    ratios = against(seconds, other, own)
    return {
        "seconds": statistics.median(wall for wall, _ in seconds[own]),
        "other_seconds": ratios["median_seconds"],
        "speedup": ratios["time_ratio"],
        "speedup_quartile_1": ratios["time_ratio_quartile_1"],
        "speedup_quartile_3": ratios["time_ratio_quartile_3"],
        "speedup_cpu_time": ratios["cpu_time_ratio"],
    }


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that was resident while `run` ran, above what was there before: Linux's own high-water mark."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the heap still holds would hide the first allocations
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the mark starts anew
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def peak_cuda_bytes(make: Callable[[], Callable[[], object]]) -> int:
    """The most memory of the GPU that tensors hold during a run of what is made, above what was there before."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    run = make()
    run()  # compiles, and tries kernels on memory of their own
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def _resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def in_child(script: str, case: dict[str, Any]) -> float:
    """The number that `python script --child '<case as JSON>'` prints last: measured in a process of its own."""
    words = [sys.executable, script, "--child", json.dumps(case)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])
