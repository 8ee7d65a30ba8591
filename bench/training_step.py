"""
A training step (forward, backward, AdamW) of Adamba, of transformers' hybrids and a Llama; what elasticity costs.

    python bench/training_step.py                  # 256 and 1,024 channels, rows of 256 and 2,048 tokens
    python bench/training_step.py --quick          # 128 channels, rows of 256
    python bench/training_step.py --device cuda    # the default with a GPU: bf16, layers compiled and as they are

`bench/peers.py` says how the models correspond. 2,048 tokens a step (a GPU: 65,536), the sides in turn in one process;
bf16: autocast. Peak memory is that of a process of its own (a GPU: of its tensors), from before the model is built to
the end of the second step. The twin of `full width` has the same weights and products in layers that know no width; a
narrow step stands beside its share of the FLOPs. On a GPU all sides have `mamba_ssm` and `causal_conv1d` where those
are installed; `compiled` is each side's layers by `torch.compile`, around the Mamba mixers with their kernels.

Targets: 1.15 × the tokens a second of the faster hybrid of transformers, in no more memory; full width 1 % over its
twin at most; a narrow step at most 1.25 × its FLOP share.
"""

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
from peers import HYBRIDS, KINDS, MIXERS, build
from runs import write_results
from side_by_side import against, in_child, in_turn, peak_bytes, peak_cuda_bytes, speedup
from transformers import PreTrainedModel

from adamba.flops import TRAINING_FACTOR, head_flops, layer_work
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.model.kernels_adamba import loads
from adamba.model.layers_adamba import AttentionLayer, ElasticLinear, ElasticRMSNorm
from adamba.model.linear_adamba import linear
from adamba.training.compiling import compile_for_training

TOKENS = {"cpu": 2048, "cuda": 65_536}
NUM_LAYERS = {"cpu": {128: 4, 256: 4, 1024: 2, 2048: 2}, "cuda": {128: 4, 256: 8, 1024: 8, 2048: 8}}
MAMBA: dict[str, dict[str, int]] = {"cpu": {}, "cuda": {"mamba_state_size": 128, "mamba_chunk_size": 256}}
TARGET = "speedup 1.15 over the faster hybrid, memory_ratio 1; full_over_twin 1.01; time_over_flops 1.25"


@dataclass(frozen=True)
class Case:
    """What is measured: a model's size, the rows of a step, and where and how it runs."""

    hidden: int
    length: int
    dtype: str
    device: str = "cpu"
    compiled: bool = False

    @property
    def num_layers(self) -> int:
        return NUM_LAYERS[self.device].get(self.hidden, 2)

    def built(self, kind: str) -> PreTrainedModel:
        with torch.device(self.device):
            return build(kind, self.hidden, self.num_layers, **MAMBA[self.device])

    def model(self, kind: str) -> PreTrainedModel:
        return self.prepared(self.built(kind))

    def prepared(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.compiled and isinstance(model, AdambaForCausalLM):
            compile_for_training(model)
        elif self.compiled:
            for layer in model.model.layers:
                keep_kernels(layer)
                layer.compile(dynamic=False)
        return model

    def stepper(self, model, **options) -> Callable[[], None]:
        ids = token_ids(model.config.vocab_size, self.length, TOKENS[self.device]).to(self.device)
        return stepper(model, ids, self.dtype, **options)


def keep_kernels(layer: torch.nn.Module) -> None:
    """Mamba mixers run as they are: inside of what is compiled transformers takes its torch path, not the kernels."""
    for module in layer.modules():
        if isinstance(module, MIXERS):
            setattr(module, "forward", torch.compiler.disable(module.forward))  # noqa: B010  mypy: a method


def token_ids(vocab: int, length: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, vocab, (tokens // length, length), generator=generator)


def stepper(model, ids: torch.Tensor, dtype: str, **options) -> Callable[[], None]:
    """One optimizer step on the same tokens each time it is called."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False, **options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_peers(case: Case, repeats: int, with_memory: bool = True) -> list[dict]:
    steps: dict[str, Callable[[], None]] = {}
    sizes: dict[str, int] = {}
    peaks: dict[str, float] = {}
    not_compiled: list[str] = []

    def add(kind: str, how: Case = case) -> Callable[[], None]:
        model = how.model(kind)
        sizes[kind], steps[kind] = trained(model), case.stepper(model)
        return steps[kind]

    for kind in KINDS:
        if case.device == "cuda":
            try:
                peaks[kind] = peak_cuda_bytes(partial(add, kind))
            except RuntimeError as error:  # what torch.compile raises for a model it cannot compile
                if kind == "adamba" or not case.compiled:
                    raise
                print(f"{kind}: runs as it is; compiling fails: {str(error).splitlines()[0]}", flush=True)
                not_compiled.append(kind)
                peaks[kind] = peak_cuda_bytes(partial(add, kind, replace(case, compiled=False)))
            continue
        add(kind)
        if with_memory:
            peaks[kind] = in_child(__file__, asdict(case) | {"kind": kind})
    seconds, tokens = in_turn(steps, repeats), TOKENS[case.device]
    rows = []
    for other in KINDS[1:]:
        compared = speedup(seconds, "adamba", other)
        row = {"measure": "peers", **asdict(case), "other": other} | compared
        row |= {"tokens_per_second": tokens / compared["seconds"]}
        row |= {"other_tokens_per_second": tokens / compared["other_seconds"]}
        row |= {"parameters": sizes["adamba"], "other_parameters": sizes[other]}
        if case.compiled:
            row["other_compiled"] = other not in not_compiled
        if peaks:
            row |= {"peak_mib": peaks["adamba"] / 2**20, "other_peak_mib": peaks[other] / 2**20}
            row |= {"memory_ratio": peaks["adamba"] / peaks[other]}
        rows.append(row)
    by = "speedup_cpu_time" if case.device == "cpu" else "speedup"  # the CPU only asks a GPU, and waits
    faster = min(rows[: len(HYBRIDS)], key=lambda row: row[by])
    shown = ("other", "speedup", "speedup_cpu_time")
    rows.append({"measure": "faster_hybrid", **asdict(case)} | {key: faster[key] for key in shown})
    return rows


def trained(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class PlainLinear(ElasticLinear):
    def forward(self, x: torch.Tensor, out_features: int | None = None) -> torch.Tensor:
        return linear(x, self.weight, self.bias, self.training)


class PlainNorm(ElasticRMSNorm):
    """`LlamaRMSNorm`, operation by operation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(dtype)


class PlainAttentionLayer(AttentionLayer):
    def forward(self, hidden, width, rope, attention_mask=None, cache=None, active=None, num_live=None, **kwargs):
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope, attention_mask, cache, None, **kwargs)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


PLAIN = {ElasticLinear: PlainLinear, ElasticRMSNorm: PlainNorm, AttentionLayer: PlainAttentionLayer}


def plain_twin(model: AdambaForCausalLM) -> AdambaForCausalLM:
    """The same weights in layers that have one width."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
    return twin


def step_flops(config: AdambaConfig, width: int | None, length: int) -> float:
    """A token's share of a plain step at one width."""
    work = layer_work(config, width, length)
    return TRAINING_FACTOR * (sum(layer.total for layer in work) + head_flops(config)) + sum(w.remade for w in work)


def bench_elastic(case: Case, repeats: int) -> list[dict]:
    model = case.built("adamba")
    assert isinstance(model, AdambaForCausalLM)
    config, twin, hidden = model.config, plain_twin(model), case.hidden
    ids = token_ids(config.vocab_size, case.length, TOKENS[case.device]).to(case.device)
    with torch.no_grad():
        difference = float((model(ids).logits - twin(ids).logits).abs().max())
    narrow = [width for width in config.width_levels.values() if width < hidden]
    copies = {width: copy.deepcopy(model) for width in narrow}
    runs = {"full": case.stepper(case.prepared(model)), "twin": case.stepper(case.prepared(twin))}
    runs |= {str(width): case.stepper(case.prepared(narrower), width=width) for width, narrower in copies.items()}
    seconds = in_turn(runs, repeats)
    rows = [{"measure": "full_over_twin", **asdict(case), "max_logit_difference": difference}]
    rows[0] |= against(seconds, "full", "twin")
    for width in narrow:
        share = step_flops(config, width, case.length) / step_flops(config, None, case.length)
        row = {"measure": "narrow_step", **asdict(case), "width": width, "flop_ratio": share}
        row |= against(seconds, str(width), "full")
        rows.append(
            row | {"time_over_flops": row["time_ratio"] / share, "cpu_time_over_flops": row["cpu_time_ratio"] / share}
        )
    return rows


def child(kind: str, **fields) -> None:
    def train(case: Case) -> None:
        step = case.stepper(case.model(kind))
        step()
        step()

    case = Case(**fields)
    train(replace(case, hidden=64, length=16))  # libraries' own buffers
    print(peak_bytes(lambda: train(case)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024], choices=NUM_LAYERS["cuda"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], help="default: both; on a GPU bf16")
    parser.add_argument("--repeats", type=int, default=9)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=list(TOKENS), help=f"here: {here}")
    parser.add_argument("--modes", nargs="+", choices=["plain", "compiled"], help="default: plain; on a GPU both")
    parser.add_argument("--only-peers", action="store_true", help="not what elasticity costs")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(**options.child)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench/training_step.py: no CUDA device here, nothing measured")
        return
    dtypes = options.dtypes or {"cpu": ["fp32", "bf16"], "cuda": ["bf16"]}[options.device]
    if options.quick:
        options.hidden, options.lengths, dtypes, options.repeats = [128], [256], ["fp32"], 3
    started = time.monotonic()
    modes = options.modes or {"cpu": ["plain"], "cuda": ["compiled", "plain"]}[options.device]
    name = "training_step" + f"_{options.device}" * (options.device != "cpu")
    layers = {str(hidden): NUM_LAYERS[options.device][hidden] for hidden in options.hidden}
    facts: dict[str, Any] = {"tokens_per_step": TOKENS[options.device], "layers": layers, "repeats": options.repeats}
    if options.device == "cuda":
        facts |= {package: loads(package) for package in ("mamba_ssm", "causal_conv1d")}
    rows: list[dict] = []
    for hidden, length, dtype, mode in itertools.product(options.hidden, options.lengths, dtypes, modes):
        case = Case(hidden, length, dtype, options.device, mode == "compiled")
        rows += bench_peers(case, options.repeats)
        if not options.only_peers:
            rows += bench_elastic(case, options.repeats)
        write_results(name, rows, started, target=TARGET, quick=options.quick, **facts)


if __name__ == "__main__":
    main()
