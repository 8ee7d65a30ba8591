"""Norm and rotation: what the base computes to the last bit, so that insertions and expansions change no logit."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from adamba.model import norm_adamba, scan_adamba
from adamba.model.layers_adamba import ElasticRMSNorm, rotate, rotations
from adamba.model.norm_adamba import rms_norm

BASE = 64


def rows(width: int, seed: int = 0) -> torch.Tensor:
    return 5 * torch.randn(4096, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_first_width_it_is_the_base_models_norm_bit_for_bit(dtype: torch.dtype) -> None:
    theirs, ours = LlamaRMSNorm(BASE, eps=1e-5), ElasticRMSNorm(BASE, BASE, eps=1e-5)
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 2.0)
        ours.weight.copy_(theirs.weight)
    x = rows(BASE).to(dtype)
    assert torch.equal(ours.to(dtype)(x), theirs.to(dtype)(x))


def test_rotations_are_llamas_bit_for_bit() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4)
    x = torch.randn(2, 4, 300, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(300)[None])
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin)
    assert torch.equal(rotate(x, rotations(cos, sin, 1)), theirs)
    theirs, _ = apply_rotary_pos_emb(x, x, cos, -sin)  # NanoChat turns the other way
    assert torch.equal(rotate(x, rotations(cos, sin, -1)), theirs)


@pytest.mark.parametrize(("width", "wider"), [(64, 80), (80, 128), (96, 1000), (64, 2560)])
def test_channels_that_are_zero_do_not_change_a_bit(width: int, wider: int) -> None:
    narrow, wide = (ElasticRMSNorm(size, BASE, eps=1e-5) for size in (width, wider))
    x = rows(width)
    padded = torch.nn.functional.pad(x, (0, wider - width))
    assert torch.equal(wide(padded)[:, :width], narrow(x))


@pytest.mark.parametrize("width", [16, 64, 80, 128])
def test_the_formula(width: int) -> None:
    norm = ElasticRMSNorm(128, BASE, eps=1e-5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    x = rows(width).double()
    expected = x / torch.sqrt(x.pow(2).sum(-1, keepdim=True) / min(width, BASE) + 1e-5) * norm.weight[:width].double()
    assert torch.allclose(norm(x.float()).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [48, 64])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_in_blocks_it_has_the_bits_and_gradients_of_torchs(width: int, gain: bool, mixed: bool) -> None:
    norm = ElasticRMSNorm(BASE, BASE, eps=1e-5, gain=gain)
    if norm.weight is not None:
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0, torch.Generator().manual_seed(1))
    x, to_out = rows(BASE).repeat(2, 1), rows(width, 1).repeat(2, 1)  # more than a block
    results = []
    for in_blocks in (False, True):
        leaf = x.clone().requires_grad_()
        norm.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            if in_blocks:
                out = norm(leaf[:, :width])
            else:
                weight = None if norm.weight is None else norm.weight[:width]
                out = torch.nn.functional.rms_norm(leaf[:, :width], (width,), weight, 1e-5)
        assert out.dtype == torch.float32
        assert (type(out.grad_fn).__name__ == "ViewBackward0") == in_blocks
        out.backward(to_out)
        results.append([out, leaf.grad, *(parameter.grad.clone() for parameter in norm.parameters())])
    for wanted, got in zip(*results, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("block_size", [12, 59])
def test_the_gradient_in_blocks_is_exact(block_size: int, monkeypatch) -> None:
    for module in (scan_adamba, norm_adamba):
        monkeypatch.setattr(module, "BLOCK_SIZE", block_size)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 5, 4), (4,)))
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-5), leaves)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, 1e-5), leaves[:1])
