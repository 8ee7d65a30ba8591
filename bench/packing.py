"""
Rendering, tokenizing and packing: this package beside TRL's own preparation, on the same rows and one core.

    python bench/packing.py            # 20,000 conversations
    python bench/packing.py --quick    # 2,000

Writes tokens per second and padding waste of both, their ratio, and how long a training step of the tiny model waits
for its loader.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # both sides on one core
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import datasets
import torch
from runs import write_results
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from adamba.data import load_mixture, materialise, pack_rows, row_texts, train_tokenizer
from adamba.training.pretraining import PackedCollator

MIX = {"calculator": 1.0, "tic_tac_toe": 0.5}
BATCH_ROWS = 16
REPEATS = 3


def time_trl(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int) -> tuple[float, int, float]:
    """Seconds, tokens and padding share of `SFTTrainer`'s tokenization and packing."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder, max_length=max_length, packing=True, assistant_only_loss=True, use_cpu=True, bf16=False
        )
        args.report_to = []
        trainer = SFTTrainer(
            LlamaForCausalLM(config), args, train_dataset=rows.select(range(8)), processing_class=tokenizer
        )
        started = time.perf_counter()
        packed = trainer._prepare_dataset(rows, tokenizer, args, True, None, "train")
        seconds = time.perf_counter() - started
    num_tokens = sum(map(len, packed["input_ids"]))
    return seconds, num_tokens, 1 - num_tokens / (len(packed) * max_length)


def time_ours(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int) -> tuple[float, int, float]:
    """The same of `pack_rows`."""
    stream = rows.to_iterable_dataset()
    started = time.perf_counter()
    packed = list(pack_rows(stream, tokenizer, max_length, assistant_only_loss=True))
    seconds = time.perf_counter() - started
    padding = sum(row["input_ids"].count(tokenizer.pad_token_id) for row in packed)
    places = len(packed) * max_length
    return seconds, places - padding, padding / places


def time_loader(tokenizer: PreTrainedTokenizerFast, max_length: int, num_steps: int) -> tuple[float, float]:
    """Seconds a step waits for its batch, tasks being generated in the same process, and seconds it computes.

    The model is the tiny recipes' widest, as a dense one: the hybrid computes more and waits the same.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    packed = pack_rows(load_mixture(MIX, split="train", seed=0), tokenizer, max_length, one_source_per_row=True)
    batches = iter(DataLoader(packed, batch_size=BATCH_ROWS, collate_fn=PackedCollator(list(MIX))))
    next(batches)  # the first block of rows is made before the first step
    waited = computed = 0.0
    for _ in range(num_steps):
        started = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - started
        batch.pop("source_id")
        started = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        computed += time.perf_counter() - started
    return waited / num_steps, computed / num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--max-length", type=int, default=1024)
    options = parser.parse_args()
    started = time.monotonic()
    torch.set_num_threads(1)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    num_rows, num_steps = (2000, 30) if options.quick else (20_000, 150)
    rows = materialise(load_mixture(MIX, split="train", seed=0), num_rows)
    texts = (text for row in itertools.islice(rows, 2000) for text in row_texts(row))
    tokenizer = train_tokenizer(texts, 1024)

    trl_speeds, our_speeds = [], []
    for _ in range(REPEATS):  # in turns, so that both see the same neighbours on this machine
        trl_seconds, trl_tokens, trl_waste = time_trl(rows, tokenizer, options.max_length)
        our_seconds, our_tokens, our_waste = time_ours(rows, tokenizer, options.max_length)
        assert our_tokens == trl_tokens, f"{our_tokens} tokens here, {trl_tokens} in TRL: not the same work"
        trl_speeds.append(trl_tokens / trl_seconds)
        our_speeds.append(our_tokens / our_seconds)
    ratios = [ours / theirs for ours, theirs in zip(our_speeds, trl_speeds, strict=True)]
    waits, computes = time_loader(tokenizer, 256, num_steps)
    result = {
        "conversations": num_rows,
        "tokens": our_tokens,
        "tokens_per_second_trl": statistics.median(trl_speeds),
        "tokens_per_second_adamba": statistics.median(our_speeds),
        "speed_ratio": statistics.median(ratios),
        "speed_ratio_range": [min(ratios), max(ratios)],
        "padding_fraction_trl": trl_waste,
        "padding_fraction_adamba": our_waste,
        "loader_wait_fraction": waits / (waits + computes),
    }
    write_results("packing", [result], started, quick=options.quick, max_length=options.max_length)


if __name__ == "__main__":
    main()
