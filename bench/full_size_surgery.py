"""
Surgery at full size on a small machine: a NanoChat-d32-sized base (random weights, 32 layers of 2,048 channels, bf16)
through phases 0, 3a and 4a of the full plan, 2,048 -> 2,560 -> 4,096 channels, 10.8 B parameters; and a slice of it.

    python bench/full_size_surgery.py            (7 minutes on 2 cores, 3 GiB of memory, 35 GB of disk)
    python bench/full_size_surgery.py --quick    (2 of the 32 layers: a minute, 5 GB of disk)

Each phase is the plan's own recipe through `run_surgery.py`, which streams by itself where memory is short; what a
phase read is deleted once it has been read. Reported: peak memory (VmHWM) above the largest single tensor (target: at
most 4 GiB), seconds of writing against seconds of copying the written files (target: at most 3 x), and the largest
difference of the residual stream after every layer and of the logits, in fp32. Beside other work the clock says
little, as copying waits for the disk and writing for a core: so CPU seconds and the load are reported too.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from runs import ROOT, WORK, metrics_of, write_results

FOLDER = WORK / "full_size"
GIB = 2**30
DISK_GB, DISK_GB_A_LAYER = 3, 1  # the two widest models, and a copy of one file
TARGET = "peak at most 4 GiB above the largest tensor; writing within 3 x of copying, both until fsync returns"
PHASES = {phase: [f"recipes/{phase}.yaml"] for phase in ("phase0", "phase3a", "phase4a")}
PHASES["slice"] = ["--operation", "slice", "--width", "normal"]
BASE = """
import json, sys, torch
from pathlib import Path
from transformers import NanoChatConfig
from adamba.data import train_tokenizer
from adamba.surgery.rules import empty_model, fresh_tensor, seed_for
from adamba.surgery.streaming import save
from adamba.tasks import TASKS
folder, layers = sys.argv[1], int(sys.argv[2])
sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 16}
config = NanoChatConfig(**sizes, num_hidden_layers=layers, vocab_size=65536, max_position_embeddings=2048)
model = empty_model(config).to(torch.bfloat16)
shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
class Random(dict):
    def __getitem__(self, name):
        return fresh_tensor("random", shapes[name], 0.02, torch.bfloat16, seed_for(name, 0))
save(model, Random(shapes), Path(folder))
texts = (json.dumps(TASKS["calculator"].example(seed, "train")) for seed in range(40))
train_tokenizer(texts, 512).save_pretrained(folder)
"""


def watched(words: list[str]) -> dict[str, float]:
    """Run a command; its peak memory, wall and CPU seconds."""
    print("$", *words[:6], flush=True)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(words, cwd=ROOT)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines)])
        time.sleep(0.2)
    if process.wait() != 0:
        raise SystemExit(f"{words[1]}: exit code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"peak_bytes": peak, "seconds": time.monotonic() - started, "cpu_seconds": cpu}


def copy_seconds(folder: Path) -> tuple[float, float, int]:
    """Clock and CPU seconds to copy a checkpoint's weights, one file at a time, and how many bytes they are."""
    seconds, num_bytes, cpu_started = 0.0, 0, time.process_time()
    for file in sorted(folder.glob("*.safetensors")):
        started = time.monotonic()
        shutil.copyfile(file, FOLDER / "copy")
        with (FOLDER / "copy").open("rb") as copy:
            os.fsync(copy.fileno())
        seconds += time.monotonic() - started
        num_bytes += file.stat().st_size
        (FOLDER / "copy").unlink()
    return seconds, time.process_time() - cpu_started, num_bytes


def largest_tensor(folder: Path) -> int:
    """Bytes of the largest tensor, from the headers of a checkpoint's files."""
    from safetensors import safe_open

    largest = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                count = 1
                for size in file.get_slice(name).get_shape():
                    count *= size
                largest = max(largest, 2 * count)  # bf16
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 layers instead of 32")
    layers = 2 if parser.parse_args().quick else 32
    started = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    needed, free = DISK_GB + DISK_GB_A_LAYER * layers, shutil.disk_usage(FOLDER).free / 1e9
    if free < needed:
        raise SystemExit(f"error: {FOLDER} needs {needed:.0f} GB, its disk has {free:.0f} GB free")
    watched([sys.executable, "-c", BASE, str(FOLDER / "base"), str(layers)])
    rows, source = [], FOLDER / "base"
    for phase, words in PHASES.items():
        target = FOLDER / phase
        options = {
            "model_name_or_path": source,
            "output_dir": target,
            "dtype": "bfloat16",
            "mix": "calculator=1.0",
            "max_length": 32,
            "num_check_rows": 1,
            "streaming": "true",
        }
        load = os.getloadavg()[0]  # of other programs: on an idle machine it is near this bench's own 1
        flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        found = watched([sys.executable, "src/run_surgery.py", *words, *flags])
        shutil.rmtree(source)
        metrics, largest = metrics_of(target), largest_tensor(target)
        copying, copying_cpu, num_bytes = copy_seconds(target)
        by_layer = {key: value for key, value in metrics.items() if "state_diff_layer" in key}
        row = {
            "phase": phase,
            "hidden_size": metrics["hidden_size"],
            "num_parameters": metrics["num_parameters"],
            "gigabytes_written": num_bytes / 1e9,
            "peak_gib": found["peak_bytes"] / GIB,
            "largest_tensor_gib": largest / GIB,
            "peak_above_largest_tensor_gib": (found["peak_bytes"] - largest) / GIB,
            "write_seconds": metrics["write_seconds"],
            "copy_seconds": copying,
            "write_cpu_seconds": metrics["write_cpu_seconds"],
            "copy_cpu_seconds": copying_cpu,
            "write_against_copy": metrics["write_seconds"] / copying,
            "write_cpu_against_copy": metrics["write_cpu_seconds"] / copying,
            "whole_run_seconds": found["seconds"],
            "whole_run_cpu_seconds": found["cpu_seconds"],
            "load_average_before": load,
            "max_state_diff_of_any_layer": max(by_layer.values()),
            "layers_compared": len(by_layer),
        }
        row |= {key: value for key, value in metrics.items() if key.startswith("max_abs_logit_diff")}
        rows.append(row)
        source = target
        write_results("full_size_surgery", rows, started, layers=layers, target=TARGET)  # should a later phase fail
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
