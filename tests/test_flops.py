"""The FLOP model against `torch.utils.flop_counter`: layer kinds, widths, frozen parts and elastic steps; its
parameter counts against the model's own."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, NanoChatConfig, NanoChatForCausalLM

from adamba.flops import (
    dense_flops_per_token,
    elastic_flops_per_token,
    forward_flops_per_token,
    head_flops,
    layer_work,
    num_parameters,
    num_trained,
    sampling_counts,
    training_flops_per_token,
)
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.training.elastic import Draw, ElasticArguments, Tally, elastic_loss
from adamba.training.freezing import PARTS, freeze_all_but
from models import random_config

LENGTH = 64
SIZES = {
    "vocab_size": 200,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "mamba_head_dim": 16,
    "mamba_num_groups": 4,
    "mamba_state_size": 32,
    "mamba_chunk_size": 16,
    "width_levels": {"ghost": 32, "normal": 64, "think": 128},
}
CONFIGS = {
    "gated": {"intermediate_size": 352},
    "not gated, big states": {"intermediate_size": 512, "mlp_gated": False, "mamba_state_size": 128},
    "mostly mamba": {"layer_types": ["full_attention"] + ["linear_attention"] * 5, "mamba_chunk_size": 32},
    "mha, tied, one chunk": {"num_key_value_heads": 8, "mamba_chunk_size": 256, "tie_word_embeddings": True},
    "wide head": {"head_dim": 32, "mamba_expand": 1, "mamba_head_dim": 8},
}


def depthwise_backward(grad_out, x, weight, *_, out_shape=None, **__) -> int:
    """The counter's own formula takes a depthwise convolution for a full one."""
    return 2 * 2 * grad_out[0] * grad_out[2] * weight[0] * weight[2]


def onednn_linear(x, weight, *_, out_shape=None, **__) -> int:
    """What large layers that train multiply with on some processors (`adamba.model.linear_adamba`)."""
    return 2 * math.prod(x) * weight[0]


def count(run) -> float:
    """FLOPs a token that `torch.utils.flop_counter` sees."""
    formulas = {torch.ops.aten.convolution_backward: depthwise_backward}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        formulas[torch.ops.mkldnn._linear_pointwise] = onednn_linear
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops() / (2 * LENGTH)


def ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def eager(config: AdambaConfig) -> AdambaForCausalLM:
    """The counter does not know the fused attention of a CPU."""
    config._attn_implementation = "eager"
    return AdambaForCausalLM(config).train()


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_agrees_with_the_counter_at_every_width(name) -> None:
    config = AdambaConfig(**SIZES | CONFIGS[name])
    model = eager(config)
    for width in (None, *config.width_levels.values()):
        counted = count(lambda width=width: model(ids(200), width=width, use_cache=False))
        work = sum(work.total for work in layer_work(config, width, LENGTH, causal=False)) + head_flops(config)
        assert work == pytest.approx(counted, rel=0.02), width
    half = sum(work.mixing for work in layer_work(config, None, LENGTH, causal=False)) - sum(
        work.mixing for work in layer_work(config, None, LENGTH)
    )
    assert half > 0 and forward_flops_per_token(config, None, LENGTH) < work, "causal attention is half the square"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", list(CONFIGS)[:3])
def test_training_agrees_with_the_counter_whatever_is_frozen(name, part) -> None:
    config = AdambaConfig(**SIZES | CONFIGS[name])
    model = eager(config)
    freeze_all_but(model, part)

    def step() -> None:
        output = model(ids(200), labels=ids(200), use_cache=False)
        if output.loss.requires_grad:
            output.loss.backward()

    assert training_flops_per_token(config, LENGTH, part, causal=False) == pytest.approx(count(step), rel=0.02)


@pytest.mark.parametrize("distill", [True, False])
def test_elastic_step_agrees_with_the_counter_over_all_draws(distill) -> None:
    config = AdambaConfig(**SIZES | CONFIGS["gated"])
    model = eager(config)
    weights = {"ghost": 1.0, "normal": 3.0, "think": 2.0}
    args = ElasticArguments(elastic=True, distill=distill, width_weights=weights)

    def cost(widths: dict[int, int]) -> float:
        chosen = Draw(widths=widths, exit_layers=[config.gate_layers[-1]], exit_level=next(iter(widths), None))
        labels = {"input_ids": ids(200), "labels": ids(200)}
        return count(lambda: elastic_loss(model, model, labels, args, chosen, 1.0, Tally()).backward())

    if distill:
        counted = cost({0: 32}) / 4 + cost({1: 64}) * 3 / 4
    else:
        counted = (cost({0: 32}) + cost({1: 64}) * 3 + cost({}) * 2) / 6
    model_says = elastic_flops_per_token(config, LENGTH, weights, distill=distill, causal=False)
    assert model_says == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    "base",
    [
        LlamaForCausalLM(LlamaConfig(vocab_size=200, hidden_size=64, intermediate_size=176, num_hidden_layers=3,
                                     num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager")),
        NanoChatForCausalLM(NanoChatConfig(vocab_size=200, hidden_size=64, intermediate_size=256, num_hidden_layers=3,
                                           num_attention_heads=4, attn_implementation="eager")),
    ],
    ids=["llama", "nanochat"],
)  # fmt: skip
def test_dense_bases_agree_with_the_counter(base) -> None:
    counted = count(lambda: base(ids(200), use_cache=False))
    assert dense_flops_per_token(base.config, LENGTH, causal=False) == pytest.approx(counted, rel=0.02)


def test_parameters_are_counted_without_making_them() -> None:
    for config in (*(random_config(seed) for seed in range(12)), AdambaConfig(**SIZES), AdambaConfig.from_depth(4)):
        with torch.device("meta"):
            model = AdambaForCausalLM(config)
        assert sum(num_parameters(config).values()) == model.num_parameters()
        for part in PARTS:
            assert num_trained(config, part) == freeze_all_but(model, part)


def test_draws_without_replacement() -> None:
    assert sampling_counts([1.0, 2.0, 3.0, 0.0], 1) == pytest.approx([1 / 6, 2 / 6, 3 / 6, 0])
    assert sampling_counts([1.0, 1.0, 2.0], 2) == pytest.approx([7 / 12, 7 / 12, 5 / 6])
    assert sampling_counts([1.0, 0.0], 2) == [1.0, 0.0]
