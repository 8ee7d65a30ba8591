"""
Tokens a second of `generate`: Adamba at every width beside transformers' hybrids, a trained agent in its exit modes.

    python bench/decoding.py                                            # 4 layers of 256 channels, random weights
    python bench/decoding.py --checkpoint checkpoints/tiny/phase5       # and the exit modes of a trained agent
    python bench/decoding.py --quick

Greedy, the same number of new tokens for every side and row (no end of text), the prompt in the time, the sides in
turn in one process. Random weights have no trained gates, so exit modes are measured on a checkpoint only: the prompts
are its own tasks', and how many layers a token took stands beside the speed. Target: 1.2 × the faster transformers
hybrid at full width and depth, and the elastic gains on top.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from peers import HYBRIDS, build
from runs import write_results
from side_by_side import in_turn, speedup

BATCHES = (1, 8, 32)
NUM_LAYERS = 4
FULL_DEPTH = {"exit_threshold": 1.0}  # whatever the checkpoint's generation config says
TARGET = "full width 1.2 x the faster transformers hybrid"


def decoder(model, ids: torch.Tensor, num_tokens: int, **options) -> Callable[[], torch.Tensor]:
    mask = torch.ones_like(ids)
    lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}

    def run() -> torch.Tensor:
        return model.generate(ids, attention_mask=mask, do_sample=False, use_cache=True, **lengths, **options)

    return run


def bench_peers(hidden: int, batch: int, length: int, num_tokens: int, repeats: int) -> list[dict]:
    """Full width against the peers, and each narrower width against full."""
    models = {kind: build(kind, hidden, NUM_LAYERS).eval() for kind in ("adamba", *HYBRIDS)}
    config = models["adamba"].config
    ids = torch.randint(1, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    runs = {kind: decoder(model, ids, num_tokens) for kind, model in models.items()}
    widths = [width for width in config.width_levels.values() if width < hidden]
    runs |= {f"width {width}": decoder(models["adamba"], ids, num_tokens, width=width) for width in widths}
    seconds = in_turn(runs, repeats)
    case = {"hidden": hidden, "batch": batch, "prompt": length, "new_tokens": num_tokens}
    rows = []
    for own, other in [("adamba", kind) for kind in HYBRIDS] + [(f"width {width}", "adamba") for width in widths]:
        compared = speedup(seconds, own, other)
        speed = {"tokens_per_second": batch * num_tokens / compared["seconds"]}
        rows.append({"measure": "decoding", **case, "side": own, "other": other} | compared | speed)
    faster = min(rows[: len(HYBRIDS)], key=lambda row: row["speedup_cpu_time"])
    shown = ("other", "speedup", "speedup_cpu_time")
    rows.append({"measure": "faster_hybrid", **case} | {key: faster[key] for key in shown})
    return rows


def modes(config, batch: int) -> dict[str, dict]:
    """What a trained agent is measured in, at full depth where nothing is said; `verify` decodes one row at a time."""
    narrow = [name for name, width in config.width_levels.items() if width < config.hidden_size]
    options: dict[str, dict] = {name: {"width": name, **FULL_DEPTH} for name in narrow}
    options |= {f"propagate {threshold}": {"exit_threshold": threshold} for threshold in (0.99, 0.9)}
    if batch == 1:
        options["verify"] = {"exit_mode": "verify"}
    return options


def bench_modes(path: str, batch: int, num_tokens: int, repeats: int) -> list[dict]:
    from adamba.loading import ModelArguments, load_model_and_tokenizer
    from adamba.tasks import TASKS, tool_schemas

    model, tokenizer = load_model_and_tokenizer(ModelArguments(model_name_or_path=path))
    model.eval()
    task = TASKS["calculator"]
    prompts = [task.prompt(3_000_000 + number, "test")["prompt"] for number in range(batch)]
    given = tokenizer.apply_chat_template(
        prompts,
        tools=tool_schemas(task.environment),
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        padding=True,
        padding_side="left",
    )
    lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "use_cache": True}
    depths: dict[str, float] = {}

    def run(name: str, options: dict) -> Callable[[], None]:
        def generate() -> None:
            model.generate(**given, **lengths, **options)
            trace = model.last_generation
            depths[name] = float((trace.exit_layers[:, 1:] + 1).float().mean())

        return generate

    sides = {"full": FULL_DEPTH} | modes(model.config, batch)
    seconds = in_turn({name: run(name, options) for name, options in sides.items()}, repeats)
    rows = []
    for name in sides:
        compared = speedup(seconds, name, "full")
        case = {"measure": "modes", "batch": batch, "prompt": given["input_ids"].shape[1], "new_tokens": num_tokens}
        speed = {"mean_layers": depths[name], "tokens_per_second": batch * num_tokens / compared["seconds"]}
        rows.append({**case, "side": name, "other": "full"} | compared | speed)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256])
    parser.add_argument("--checkpoint", help="a trained agent, for the exit modes")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.prompt, options.new_tokens, options.repeats = [128], 32, 16, 3
    started = time.monotonic()
    rows: list[dict] = []
    for batch in BATCHES:
        for hidden in options.hidden:
            rows += bench_peers(hidden, batch, options.prompt, options.new_tokens, options.repeats)
        if options.checkpoint:
            rows += bench_modes(options.checkpoint, batch, options.new_tokens, options.repeats)
        facts = {"layers": NUM_LAYERS, "repeats": options.repeats, "quick": options.quick, "target": TARGET}
        write_results("decoding", rows, started, **facts)


if __name__ == "__main__":
    main()
