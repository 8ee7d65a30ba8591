"""
Two processes against one: do DDP, ZeRO-1, 2 and 3, offload and FSDP2 train the same model?

    python bench/sharding.py                  # each of accelerate_configs/ that gloo can run
    python bench/sharding.py zero3 fsdp2      # these

The tiny elastic hybrid of the tests, 20 steps, widths and exits drawn anew in each. For every config: the largest
difference of a step's loss to one process, the largest difference of a weight at the end, and whether a resume from
step 10 on two processes ends in the same bits. Target: losses within 1e-5. What differs from the files is that there
are two processes on a CPU, gloo and fp32 (`tests/processes.py`).
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402
from runs import write_results  # noqa: E402

import run_pretrain  # noqa: E402, F401  (before the forks)
from processes import STEPS, largest_difference, launch, without_step, write_elastic_recipe  # noqa: E402
from tiny_runs import tensors  # noqa: E402

CONFIGS = ("ddp_cpu", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")


def measure(config: str, folder: Path) -> dict:
    recipe, out, resumed = folder / "recipe.yaml", folder / config, folder / f"{config}_resumed"
    started = time.perf_counter()
    launch(2, folder, recipe, "--output_dir", out, config=config)
    seconds = time.perf_counter() - started
    kept = without_step(out, STEPS, folder / f"{config}_kept")
    launch(2, folder, recipe, "--output_dir", resumed, "--resume_from_checkpoint", kept, config=config)
    one, two, again = tensors(folder / "one"), tensors(out), tensors(resumed)
    return {
        "config": config,
        "max_abs_loss_difference": largest_difference(folder / "one", out),
        "max_abs_weight_difference": max((one[name] - two[name]).abs().max().item() for name in one),
        "same_tensors": one.keys() == two.keys(),
        "resume_bit_exact": all(torch.equal(two[name], again[name]) for name in two),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=CONFIGS, help=f"of {', '.join(CONFIGS)}")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_elastic_recipe(folder)
        launch(1, folder, folder / "recipe.yaml", "--output_dir", folder / "one")
        rows = [measure(config, folder) for config in options.configs]
    write_results("sharding", rows, started, steps=STEPS, processes=2, target_loss_difference=1e-5)


if __name__ == "__main__":
    main()
