"""
EleutherAI's evaluation harness on a checkpoint of ours, at a chosen width, offline, on a task of two small YAML files.

    pip install -c constraints.txt -e ".[harness]"
    python bench/harness.py --checkpoint checkpoints/router/router        # 3 minutes

The harness loads the checkpoint with `trust_remote_code=True` and knows nothing of this package. Its generations take
a width by `--gen_kwargs width=ghost`; for its likelihoods the width is sliced out as a checkpoint of its own
(`run_surgery.py`, `operation: slice`).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from runs import ROOT, WORK, command, write_results
from transformers import AutoTokenizer

from adamba.tasks import TASKS

FOLDER = WORK / "harness"  # the tasks' YAML files name it
FIRST_SEED = 4_000_000
CHOICES = 4


def write_rows(tokenizer, count: int) -> None:
    """Prompt, the solver's call, and that call among others."""

    def text(messages: list[dict], tools: list, **options) -> str:
        return tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, **options)

    rows = []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        example = TASKS["calculator"].example(seed, "test")
        question, call = example["messages"][:1], example["messages"][:2]
        prompt = text(question, example["tools"], add_generation_prompt=True)
        answer = text(call, example["tools"])[len(prompt) :].removesuffix("\n").removesuffix(tokenizer.eos_token)
        # what generation gives back has no special tokens
        rows.append({"prompt": prompt, "call": tokenizer.decode(tokenizer.encode(answer), skip_special_tokens=True)})
    rng = random.Random(0)
    for row in rows:
        others = rng.sample([other["call"] for other in rows if other["call"] != row["call"]], CHOICES - 1)
        row["right"] = rng.randrange(CHOICES)
        row["choices"] = [*others[: row["right"]], row["call"], *others[row["right"] :]]
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def harness(checkpoint: Path, task: str, *options: str) -> dict:
    """Run `lm_eval` and return the task's results."""
    out = FOLDER / "out"
    words = [
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={checkpoint},trust_remote_code=True",
    ]
    words += ["--tasks", task, "--include_path", "bench/harness_tasks", "--device", "cpu", "--batch_size", "16"]
    words += ["--output_path", str(out), *options]
    print("$ python", *words, flush=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, env={**os.environ, **offline})
    newest = max(out.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text(encoding="utf-8"))["results"][task]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/tiny/phase5"))
    parser.add_argument("--width", default="whisper", help="level, or channels, beside the full width")
    parser.add_argument("--rows", type=int, default=100)
    options = parser.parse_args()
    if importlib.util.find_spec("lm_eval") is None:
        raise SystemExit("error: lm_eval is not installed: pip install -c constraints.txt -e '.[harness]'")
    started = time.monotonic()
    write_rows(AutoTokenizer.from_pretrained(options.checkpoint), options.rows)
    rows = []
    for width, more in (("full", ()), (options.width, ("--gen_kwargs", f"width={options.width}"))):
        found = harness(options.checkpoint, "adamba_calls", *more)
        rows.append({"task": "adamba_calls", "width": width, "exact_match": found["exact_match,none"]})
    sliced = FOLDER / f"width_{options.width}"
    surgery = ("--operation", "slice", "--width", options.width, "--mix", "calculator=1.0")
    command("run_surgery.py", *surgery, "--model_name_or_path", options.checkpoint, "--output_dir", sliced)
    for width, checkpoint in (("full", options.checkpoint), (options.width, sliced)):
        rows.append({"task": "adamba_choice", "width": width, "acc": harness(checkpoint, "adamba_choice")["acc,none"]})
    facts = {"lm_eval": importlib.metadata.version("lm_eval"), "questions": options.rows}
    write_results("harness", rows, started, **facts)


if __name__ == "__main__":
    main()
