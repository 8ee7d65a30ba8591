"""
Bytes that a training step holds for each logit at its peak: what `adamba.budget.memory` counts with.

    python bench/logits_memory.py

Each step runs in a process of its own, its resident memory sampled every 2 ms; a model of 64 channels and 32,768
tokens of vocabulary, so that logits are nearly all of it.
"""

import subprocess
import sys
import threading
import time

import psutil
import torch
from runs import write_results

from adamba.budget.memory import LOGIT_BYTES
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.training.elastic import Draw, ElasticArguments, Tally, elastic_loss, token_losses

VOCAB, TOKENS = 32768, 1024


def peak_bytes(kind: str, dtype: str) -> float:
    """Peak of one step above what was there before it, a logit."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "first_exit_layer": 0}
    mamba = {"mamba_head_dim": 16, "mamba_num_groups": 4}
    config = AdambaConfig(vocab_size=VOCAB, **sizes, **mamba, width_levels={"ghost": 16, "think": 64})
    model = AdambaForCausalLM(config).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step(ids: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            if kind == "elastic":
                batch = {"input_ids": ids, "labels": ids}
                loss, _ = elastic_loss(
                    model, model, batch, ElasticArguments(elastic=True), Draw({0: 16}, [0], None), 1.0, Tally()
                )
            else:
                loss = token_losses(model(ids, use_cache=False).logits, ids).sum()
        loss.backward()

    ids = torch.randint(0, VOCAB, (2, TOKENS // 2))
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
    return (peak[0] - before) / (TOKENS * VOCAB)


def main() -> None:
    if len(sys.argv) == 3:
        print(peak_bytes(*sys.argv[1:]))
        return
    started = time.monotonic()
    rows = []
    for kind, counted in LOGIT_BYTES.items():
        for dtype in ("bf16", "fp32"):
            done = subprocess.run([sys.executable, __file__, kind, dtype], capture_output=True, text=True, check=True)
            rows.append({"step": kind, "dtype": dtype, "bytes_per_logit": float(done.stdout), "counted": counted})
            print(f"{kind:8} {dtype}  {rows[-1]['bytes_per_logit']:5.1f} bytes a logit, counted {counted}")
    write_results("logits_memory", rows, started)


if __name__ == "__main__":
    main()
