"""The plain torch scan against transformers' own, and against itself step by step."""

import itertools

import pytest
import torch
from transformers.models.mamba2.modeling_mamba2 import (
    MambaRMSNormGated,
    mamba2_chunk_scan,
    mamba2_selective_state_update,
)

from adamba.model import scan_adamba
from adamba.model.convolution_adamba import causal_conv
from adamba.model.norm_adamba import GatedRMSNorm
from adamba.model.recurrence_adamba import scan_step
from adamba.model.scan_adamba import chunk_scan


def inputs(seed: int, length: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    batch, heads, groups, head_dim, states = 2, 6, 3, 4, 5
    return {
        "x": normal(batch, length, heads, head_dim),
        "dt": normal(batch, length, heads).abs(),
        "a": -normal(heads).exp(),
        "b": normal(batch, length, groups, states),
        "c": normal(batch, length, groups, states),
        "d": normal(heads),
        "state": normal(batch, heads, head_dim, states),
    }


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (5, 8), (16, 4), (23, 8), (64, 16)])
def test_chunk_scan_equals_transformers(length: int, chunk: int, with_state: bool) -> None:
    given = inputs(length, length)
    state = given["state"] if with_state else None
    ours = chunk_scan(given["x"], given["dt"], given["a"], given["b"], given["c"], given["d"], chunk, state)
    theirs = mamba2_chunk_scan(
        given["x"],
        given["dt"],
        given["a"],
        given["b"],
        given["c"],
        chunk_size=min(chunk, length),
        D=given["d"],
        initial_states=state,
        return_final_states=True,
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_gradients_equal_transformers() -> None:
    given = inputs(0, 23)
    gradients = []
    for scan in ("ours", "theirs"):
        leaves = {key: value.clone().requires_grad_() for key, value in given.items()}
        x, dt, a, b, c = (leaves[key] for key in ("x", "dt", "a", "b", "c"))
        if scan == "ours":
            y, last = chunk_scan(x, dt, a, b, c, leaves["d"], 8, leaves["state"])
        else:
            y, last = mamba2_chunk_scan(
                x, dt, a, b, c, 8, D=leaves["d"], initial_states=leaves["state"], return_final_states=True
            )
        (y.sin().sum() + last.cos().sum()).backward()
        gradients.append({key: leaf.grad for key, leaf in leaves.items()})
    for key in given:
        torch.testing.assert_close(gradients[0][key], gradients[1][key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_size", [1, 2**18])
def test_halves_are_what_converting_them_first_gives(block_size: int, monkeypatch) -> None:
    monkeypatch.setattr(scan_adamba, "BLOCK_SIZE", block_size)
    given = inputs(1, 23)
    halves = {key: given[key].bfloat16() for key in ("x", "b", "c")}
    results = []
    for first in (False, True):
        leaves = {key: value.clone().requires_grad_() for key, value in (given | halves).items()}
        x, b, c = (leaves[key].float() if first else leaves[key] for key in ("x", "b", "c"))
        y, last = chunk_scan(x, leaves["dt"], leaves["a"], b, c, leaves["d"], 8, leaves["state"])
        assert y.dtype == last.dtype == torch.float32
        (y.sin().sum() + last.cos().sum()).backward()
        results.append([y, last, *(leaf.grad for leaf in leaves.values())])
    for mine, converted in zip(*results, strict=True):
        assert mine.dtype == converted.dtype
        assert torch.equal(mine, converted)


def test_steps_equal_the_chunked_form_and_transformers() -> None:
    given = inputs(3, 11)
    whole, last = chunk_scan(*(given[key] for key in ("x", "dt", "a", "b", "c", "d")), 4, given["state"])
    ours, theirs = given["state"].clone(), given["state"].clone()
    for t in range(11):
        x, dt, b, c = (given[key][:, t] for key in ("x", "dt", "b", "c"))
        y = scan_step(x, dt, given["a"], b, c, given["d"], ours)
        torch.testing.assert_close(y, whole[:, t], rtol=1e-5, atol=1e-5)
        per_channel = (6, 4)
        other = mamba2_selective_state_update(
            theirs,
            x,
            dt[..., None].expand(-1, *per_channel),
            given["a"][:, None, None].expand(*per_channel, 5),
            b,
            c,
            given["d"][:, None].expand(*per_channel),
        )
        torch.testing.assert_close(y, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, last, rtol=1e-5, atol=1e-5)


def test_a_slow_head_forgets_token_by_token_in_bf16_too() -> None:
    """Its decay, 0.9985, is 1 in bf16: after 1,000 steps the state would hold twice what it should."""
    given = {name: value.bfloat16() for name, value in inputs(0, 1000).items()}
    given["dt"], given["a"] = torch.full_like(given["dt"], 1.5e-3), -torch.ones_like(given["a"])
    arguments = [given[key] for key in ("x", "dt", "a", "b", "c", "d")]
    _, exact = chunk_scan(*(argument.double() for argument in arguments), 50)
    x, dt, a, b, c, d = arguments
    state = torch.zeros_like(given["state"], dtype=torch.float32)
    for t in range(1000):
        scan_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], d, state)
    assert (state.double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("chunk", [3, 8, 32])
def test_no_state_crosses_a_document_border(chunk: int) -> None:
    given = inputs(5, 20)
    borders = [0, 1, 9, 12, 20]
    document = torch.cat(
        [torch.full((2, end - start), n) for n, (start, end) in enumerate(itertools.pairwise(borders))], 1
    )
    names = ("x", "dt", "a", "b", "c")
    packed, _ = chunk_scan(*(given[key] for key in names), given["d"], chunk, None, document)
    for start, end in zip(borders, borders[1:], strict=False):
        part = {key: given[key] if key == "a" else given[key][:, start:end] for key in names}
        alone, _ = chunk_scan(*part.values(), given["d"], chunk)
        torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-5, atol=1e-5)


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2]])


@pytest.mark.parametrize("block_size", [1, 2**18])  # a chunk at a time, and all at once
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_written_out_gradients_are_those_of_the_function(documents, block_size: int, monkeypatch) -> None:
    monkeypatch.setattr(scan_adamba, "BLOCK_SIZE", block_size)
    given = inputs(7, 11, torch.float64)
    leaves = tuple(given[key].requires_grad_() for key in ("x", "dt", "a", "b", "c", "d", "state"))
    assert torch.autograd.gradcheck(lambda *args: chunk_scan(*args[:6], 4, args[6], documents), leaves, fast_mode=True)


@pytest.mark.parametrize("block_size", [6, 2**18])  # two tokens of three channels at a time, and all at once
@pytest.mark.parametrize("kernel", [1, 4])
def test_convolution_stays_in_its_document_and_its_gradient_is_exact(
    kernel: int, block_size: int, monkeypatch
) -> None:
    monkeypatch.setattr(scan_adamba, "BLOCK_SIZE", block_size)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 11, 3), (3, kernel), (3,))
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    packed = causal_conv(x, weight, bias, DOCUMENTS)
    for row, borders in enumerate(([0, 3, 5, 6, 11], [0, 1, 8, 11])):
        for start, end in itertools.pairwise(borders):
            padded = torch.nn.functional.pad(x[row, start:end].T, (kernel - 1, 0))
            alone = torch.nn.functional.silu(torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=3))
            torch.testing.assert_close(packed[row, start:end], alone.T)
    assert torch.autograd.gradcheck(lambda *args: causal_conv(*args, DOCUMENTS), (x, weight, bias))
    whole = causal_conv(x, weight, bias)
    padded = torch.nn.functional.pad(x.mT, (kernel - 1, 0))
    plain = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=3)
    torch.testing.assert_close(whole, torch.nn.functional.silu(plain).mT)
    assert torch.autograd.gradcheck(causal_conv, (x, weight, bias))


def test_a_broken_document_does_not_break_its_neighbour() -> None:
    given = inputs(9, 11)
    x = torch.randn(2, 11, 3)
    for broken in (given["x"], x):
        broken[0, :3] = float("nan")
    y = causal_conv(x, torch.randn(3, 4), torch.randn(3), DOCUMENTS)
    assert y[0, 3:].isfinite().all() and y[0, :3].isnan().all()


@pytest.mark.parametrize("block_size", [12, 2**18])
def test_gated_norm_is_transformers_and_its_gradient_is_exact(block_size: int, monkeypatch) -> None:
    monkeypatch.setattr(scan_adamba, "BLOCK_SIZE", block_size)
    generator = torch.Generator().manual_seed(0)
    y, gate = (torch.randn(2, 5, 6, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    norm = GatedRMSNorm(6, group_size=3, eps=1e-5).double()
    torch.nn.init.normal_(norm.weight, generator=generator)
    assert torch.autograd.gradcheck(
        lambda *args: torch.func.functional_call(norm, {"weight": args[2]}, args[:2]), (y, gate, norm.weight)
    )
    single = norm.float()
    theirs = MambaRMSNormGated.forward(single, y.float(), gate.float())
    torch.testing.assert_close(single(y.float(), gate.float()), theirs, rtol=1e-6, atol=1e-6)
