"""
Peak memory of a training step at a vocabulary of 65,536: elastic with an exit, against plain training.

    python bench/logits_memory.py                   (about 2 minutes, 6 GiB)
    python bench/logits_memory.py --dtypes bf16     (on a CPU without bf16 instructions: half an hour)

plain: `model(input_ids, labels).loss`, as transformers does it, all logits at once; ours: the same loss by
`adamba.training.head_losses`; elastic: full width, one narrower that learns from it, one exit and its gate. Each in a
process of its own, its resident memory sampled every 2 ms. Target: elastic within 1.3 x of plain.
"""

import argparse
import subprocess
import sys
import threading
import time

import psutil
import torch
from runs import write_results

from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.training.elastic import Draw, ElasticArguments, Tally, elastic_loss
from adamba.training.head_losses import next_token_losses

VOCAB, ROWS, LENGTH = 65_536, 4, 512
KINDS = ("plain", "ours", "elastic")


def peak_bytes(kind: str, dtype: str) -> int:
    """Peak of one step above what was there before it."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "first_exit_layer": 1}
    config = AdambaConfig(vocab_size=VOCAB, **sizes, width_levels={"ghost": 64, "think": 256})
    model = AdambaForCausalLM(config).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    args, chosen = ElasticArguments(elastic=True), Draw({0: 64}, [1], None)

    def step(ids: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            if kind == "elastic":
                batch = {"input_ids": ids, "labels": ids}
                loss = elastic_loss(model, model, batch, args, chosen, ids.numel(), Tally())
            elif kind == "ours":
                loss = next_token_losses(model, model, {"input_ids": ids}, ids)[0] / ids.numel()
            else:
                loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()

    ids = torch.randint(0, VOCAB, (ROWS, LENGTH))
    step(ids[:, :8])
    process, peak, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    step(ids)
    done.set()
    watcher.join()
    return peak[0] - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--child", nargs=2, metavar=("STEP", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(peak_bytes(*options.child))
        return
    started = time.monotonic()
    rows: list[dict] = []
    for dtype in options.dtypes:
        peaks = {}
        for kind in KINDS:
            done = subprocess.run(
                [sys.executable, __file__, "--child", kind, dtype], capture_output=True, text=True, check=True
            )
            peaks[kind] = int(done.stdout)
            row = {"step": kind, "dtype": dtype, "peak_mib": peaks[kind] / 2**20}
            row["bytes_per_logit"] = peaks[kind] / (VOCAB * ROWS * LENGTH)
            rows.append(row | {"over_plain": peaks[kind] / peaks["plain"]})
    write_results("logits_memory", rows, started, target="elastic at most 1.3 x plain")


if __name__ == "__main__":
    main()
