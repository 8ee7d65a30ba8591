"""
A training step (forward, backward, AdamW) of Adamba, of transformers' hybrids and a Llama; what elasticity costs.

    python bench/training_step.py            # 256 and 1,024 channels, rows of 256 and 2,048 tokens, fp32 and bf16
    python bench/training_step.py --quick    # 128 channels, rows of 256

`bench/peers.py` says how the models correspond. 2,048 tokens a step, the sides in turn in one process; bf16: autocast.
Peak memory is that of a process of its own, from before the model is built to the end of the second step. The twin of
`full width` has the same weights in layers that know no width; a narrow step stands beside its share of the FLOPs.

Targets: 1.15 × the tokens a second of the faster hybrid of transformers, in no more memory; full width 1 % over its
twin at most; a narrow step at most 1.25 × its FLOP share.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import torch.nn.functional as F
from peers import HYBRIDS, KINDS, build
from runs import write_results
from side_by_side import against, in_child, in_turn, peak_bytes, speedup

from adamba.flops import TRAINING_FACTOR, head_flops, layer_work
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.model.layers_adamba import AttentionLayer, ElasticLinear, ElasticRMSNorm

TOKENS = 2048
NUM_LAYERS = {128: 4, 256: 4, 1024: 2}
TARGET = "speedup 1.15 over the faster hybrid, memory_ratio 1; full_over_twin 1.01; time_over_flops 1.25"


def token_ids(vocab: int, length: int, tokens: int = TOKENS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, vocab, (tokens // length, length), generator=generator)


def stepper(model, ids: torch.Tensor, dtype: str, **options) -> Callable[[], None]:
    """One optimizer step on the same tokens each time it is called."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False, **options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_peers(hidden: int, length: int, dtype: str, repeats: int, with_memory: bool = True) -> list[dict]:
    models = {kind: build(kind, hidden, NUM_LAYERS[hidden]) for kind in KINDS}
    ids = token_ids(models["adamba"].config.vocab_size, length)
    seconds = in_turn({kind: stepper(model, ids, dtype) for kind, model in models.items()}, repeats)
    case = {"hidden": hidden, "length": length, "dtype": dtype}
    peaks = {kind: in_child(__file__, case | {"kind": kind}) for kind in KINDS} if with_memory else {}
    rows = []
    for other in KINDS[1:]:
        compared = speedup(seconds, "adamba", other)
        row = {"measure": "peers", **case, "other": other} | compared
        row |= {"tokens_per_second": TOKENS / compared["seconds"]}
        row |= {"other_tokens_per_second": TOKENS / compared["other_seconds"]}
        row |= {"parameters": trained(models["adamba"]), "other_parameters": trained(models[other])}
        if peaks:
            row |= {"peak_mib": peaks["adamba"] / 2**20, "other_peak_mib": peaks[other] / 2**20}
            row |= {"memory_ratio": peaks["adamba"] / peaks[other]}
        rows.append(row)
    faster = min(rows[: len(HYBRIDS)], key=lambda row: row["speedup_cpu_time"])
    shown = ("other", "speedup", "speedup_cpu_time")
    rows.append({"measure": "faster_hybrid", **case} | {key: faster[key] for key in shown})
    return rows


def trained(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class PlainLinear(ElasticLinear):
    def forward(self, x: torch.Tensor, out_features: int | None = None) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


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


def bench_elastic(hidden: int, length: int, dtype: str, repeats: int) -> list[dict]:
    model = build("adamba", hidden, NUM_LAYERS[hidden])
    assert isinstance(model, AdambaForCausalLM)
    config, twin = model.config, plain_twin(model)
    ids = token_ids(config.vocab_size, length)
    with torch.no_grad():
        difference = float((model(ids).logits - twin(ids).logits).abs().max())
    runs = {"full": stepper(model, ids, dtype), "twin": stepper(twin, ids, dtype)}
    narrow = [width for width in config.width_levels.values() if width < hidden]
    runs |= {str(width): stepper(copy.deepcopy(model), ids, dtype, width=width) for width in narrow}
    seconds = in_turn(runs, repeats)
    case = {"hidden": hidden, "length": length, "dtype": dtype}
    rows = [{"measure": "full_over_twin", **case, "max_logit_difference": difference}]
    rows[0] |= against(seconds, "full", "twin")
    for width in narrow:
        share = step_flops(config, width, length) / step_flops(config, None, length)
        row = {"measure": "narrow_step", **case, "width": width, "flop_ratio": share}
        row |= against(seconds, str(width), "full")
        rows.append(
            row | {"time_over_flops": row["time_ratio"] / share, "cpu_time_over_flops": row["cpu_time_ratio"] / share}
        )
    return rows


def child(case: dict) -> None:
    def train(hidden: int, length: int, tokens: int) -> None:
        model = build(case["kind"], hidden, NUM_LAYERS.get(hidden, 2))
        step = stepper(model, token_ids(model.config.vocab_size, length, tokens), case["dtype"])
        step()
        step()

    train(64, 16, 16)  # libraries' own buffers
    print(peak_bytes(lambda: train(case["hidden"], case["length"], TOKENS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024], choices=NUM_LAYERS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    if options.quick:
        options.hidden, options.lengths, options.dtypes, options.repeats = [128], [256], ["fp32"], 3
    started = time.monotonic()
    rows: list[dict] = []
    for hidden in options.hidden:
        for length in options.lengths:
            for dtype in options.dtypes:
                rows += bench_peers(hidden, length, dtype, options.repeats)
                rows += bench_elastic(hidden, length, dtype, options.repeats)
                layers = {str(hidden): NUM_LAYERS[hidden] for hidden in options.hidden}
                facts = {"tokens_per_step": TOKENS, "layers": layers, "repeats": options.repeats}
                write_results("training_step", rows, started, target=TARGET, quick=options.quick, **facts)


if __name__ == "__main__":
    main()
