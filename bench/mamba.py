"""
Our plain torch Mamba-2 layer beside transformers' torch fallback, which everyone without a GPU runs: same weights,
same numbers, how fast, how much memory.

    python bench/mamba.py            # 256 and 1,024 channels, 2,048 tokens as rows of 256, 512 and 2,048
    python bench/mamba.py --quick    # 256 channels, rows of 2,048

Forward, forward + backward and one-token decode steps, the sides in turn in one process. The two projections are the
same matrix products on both sides and most of a wide layer's time; `part: path` leaves them out and measures what the
fallback is: convolution, scan and gated norm. Peak memory, at the longest rows, is what one run adds to the resident
memory of a process of its own (Linux's high-water mark). The fallback runs with our chunk size, which suits it better,
and with its own default of 256. Targets at length 2,048: 2 × the speed, half the memory, the same numbers to 1e-5.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from runs import write_results
from side_by_side import in_child, in_turn, peak_bytes, speedup
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TheirMixer

from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.model.mamba_adamba import Mamba2Mixer

TOKENS = 2048
CHUNK_SIZES = (64, 256)  # ours, and the fallback's default
LAYER = 1  # the first layer of a default hybrid is attention
DECODED = 16  # tokens of one timed decode run
TARGET = "path at length 2048: speedup 2, memory_ratio 0.5, differences 1e-5"


def our_config(hidden: int) -> AdambaConfig:
    heads = hidden // 64
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads, "mamba_chunk_size": CHUNK_SIZES[0]}
    return AdambaConfig(hidden_size=hidden, num_hidden_layers=2, vocab_size=64, rms_norm_eps=1e-5, **sizes)


def their_config(ours: AdambaConfig, chunk_size: int) -> Mamba2Config:
    return Mamba2Config(
        hidden_size=ours.hidden_size,
        num_heads=ours.mamba_num_heads,
        head_dim=ours.mamba_head_dim,
        state_size=ours.mamba_state_size,
        n_groups=ours.mamba_num_groups,
        expand=ours.mamba_expand,
        conv_kernel=ours.mamba_conv_kernel,
        chunk_size=chunk_size,
        layer_norm_epsilon=ours.rms_norm_eps,
        num_hidden_layers=2,
        vocab_size=64,
    )


class NoProjection(torch.nn.Module):
    weight = bias = None  # the fallback looks at them

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def mixers(hidden: int, part: str) -> dict[str, torch.nn.Module]:
    """Ours, and the fallback with each chunk size, all with the same weights; of a `layer`, or its `path` alone."""
    torch.manual_seed(0)
    config = our_config(hidden)
    ours = AdambaForCausalLM(config).model.layers[LAYER].mixer
    assert isinstance(ours, Mamba2Mixer)
    sides: dict[str, torch.nn.Module] = {"adamba": ours.train()}
    for chunk_size in CHUNK_SIZES:
        theirs = TheirMixer(their_config(config, chunk_size), LAYER)
        theirs.load_state_dict(ours.state_dict())
        sides[f"transformers, chunk {chunk_size}"] = theirs.train()
    if part == "path":
        for mixer in sides.values():
            mixer.in_proj = mixer.out_proj = NoProjection()
    return sides


def call(mixer: torch.nn.Module, x: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
    if isinstance(mixer, Mamba2Mixer):
        return mixer(x, cache, None, None, None)
    return mixer(x, cache_params=cache)


def forward(mixer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return call(mixer, x)


def train(mixer: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of one forward and backward pass."""
    x = x.detach().requires_grad_()
    mixer.zero_grad()
    y = call(mixer, x)
    y.square().mean().backward()
    return {"y": y.detach(), "x": x.grad} | {name: parameter.grad for name, parameter in mixer.named_parameters()}


MEASURES: dict[str, Callable] = {"forward": forward, "training": train}


def differences(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """The largest of the outputs, and of the gradients as a share of the largest entry of theirs."""
    output = float((ours["y"] - theirs["y"]).abs().max())
    gradients = ((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max() for name in theirs if name != "y")
    return output, max(map(float, gradients))


def noise(hidden: int, length: int, batch: int, part: str = "layer") -> torch.Tensor:
    config = our_config(hidden)
    projected = 2 * config.mamba_inner_size + 2 * config.mamba_num_groups * config.mamba_state_size
    width = hidden if part == "layer" else projected + config.mamba_num_heads
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(0))


def bench_length(hidden: int, length: int, part: str, repeats: int, with_memory: bool) -> list[dict]:
    sides, x = mixers(hidden, part), noise(hidden, length, TOKENS // length, part)
    ours, *others = sides
    results = {name: train(mixer, x) for name, mixer in sides.items()}
    rows = []
    for measure, run in MEASURES.items():
        seconds = in_turn({name: lambda m=m, run=run: run(m, x) for name, m in sides.items()}, repeats)
        case = {"hidden": hidden, "length": length, "part": part, "measure": measure}
        peaks = {name: in_child(__file__, case | {"side": name}) for name in sides} if with_memory else {}
        for other in others:
            output, gradient = differences(results[ours], results[other])
            row = case | {"batch": TOKENS // length, "other": other} | speedup(seconds, ours, other)
            row |= {"max_difference": output, "max_gradient_difference": gradient}
            if peaks:
                row |= {"peak_mib": peaks[ours] / 2**20, "other_peak_mib": peaks[other] / 2**20}
                row |= {"memory_ratio": peaks[ours] / peaks[other]}
            rows.append(row)
    return rows


def bench_decode(hidden: int, batch: int, repeats: int) -> list[dict]:
    """Steps of one token on a cache that has seen a prompt."""
    sides, prompt, steps = mixers(hidden, "layer"), noise(hidden, 64, batch), noise(hidden, DECODED, batch)
    config = our_config(hidden)
    del sides[f"transformers, chunk {CHUNK_SIZES[1]}"]  # a step has no chunks
    last: dict[str, torch.Tensor] = {}

    def decode(name: str) -> Callable[[], None]:
        mixer = sides[name]
        cache = DynamicCache(config=config if name == "adamba" else their_config(config, CHUNK_SIZES[0]))

        @torch.no_grad()
        def run() -> None:
            for place in range(DECODED):
                last[name] = call(mixer, steps[:, place : place + 1], cache)

        with torch.no_grad():
            call(mixer, prompt, cache)
        return run

    seconds = in_turn({name: decode(name) for name in sides}, repeats)
    ours, other = sides
    row = {"hidden": hidden, "length": 1, "part": "layer", "measure": "decode", "batch": batch, "other": other}
    row |= speedup(seconds, ours, other)
    return [row | {"max_difference": float((last[ours] - last[other]).abs().max())}]


def child(case: dict) -> None:
    hidden, part, run = case["hidden"], case["part"], MEASURES[case["measure"]]
    mixer = mixers(hidden, part)[case["side"]]
    run(mixer, noise(hidden, 8, 1, part))  # libraries' own buffers, and gradients
    x = noise(hidden, case["length"], TOKENS // case["length"], part)
    print(peak_bytes(lambda: run(mixer, x)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 channels, rows of 2,048")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    if options.quick:
        options.hidden, options.lengths, options.repeats = [256], [2048], 3
    started, longest = time.monotonic(), max(options.lengths)
    rows: list[dict] = []
    for hidden in options.hidden:
        for length in options.lengths:
            for part in ("path", "layer"):
                rows += bench_length(hidden, length, part, options.repeats, with_memory=length == longest)
        rows += [row for batch in (1, 8) for row in bench_decode(hidden, batch, 5 * options.repeats)]
        facts = {"tokens": TOKENS, "repeats": options.repeats, "target": TARGET, "quick": options.quick}
        write_results("mamba", rows, started, **facts)


if __name__ == "__main__":
    main()
