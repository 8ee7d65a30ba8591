"""
What only a GPU runs: kernels, torch's attention for packed rows and compiled layers, against plain twins and the CPU.

Skipped without a GPU. All is checked without `mamba_ssm` and `causal_conv1d` and, where they are installed, with them:
they multiply in TF32 or bf16, so what they give is near, not equal. `make test-kernels` runs these on a CPU, with the
kernels in Triton's interpreter.
"""

import os
from collections.abc import Callable
from heapq import nlargest
from operator import itemgetter

import pytest
import torch

from adamba.model import AdambaForCausalLM, kernels_adamba
from adamba.model.convolution_adamba import causal_conv, convolve_rows
from adamba.model.documents_adamba import number_documents
from adamba.model.mamba_adamba import Mamba2Mixer
from adamba.training.compiling import compile_for_training
from models import hybrid, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
ROUNDED = not INTERPRETED or os.environ.get("ROUNDING") == "tf32"  # the products inside kernels

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a CUDA device")
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")

# Sizes that the kernels take, and are fast at.
SIZES = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
SIZES |= {"intermediate_size": 256, "width_levels": {"ghost": 32, "normal": 64, "think": 128}}
SIZES |= {"mamba_state_size": 64, "mamba_head_dim": 64, "mamba_chunk_size": 64}
EXACT, NEAR = 1e-4, 2e-2


@pytest.fixture(params=["plain", "kernels"])
def tolerance(request, monkeypatch: pytest.MonkeyPatch) -> float:
    """Relative to the size of what is compared."""

    def decide(has_kernels: Callable[[str, torch.Tensor], bool]) -> None:
        for module in ("convolution_adamba", "mamba_adamba"):  # each has the name for itself
            monkeypatch.setattr(f"adamba.model.{module}.has_kernels", has_kernels)

    if request.param == "plain":
        if INTERPRETED:
            pytest.skip("no kernel to interpret")
        decide(lambda package, tensor: False)
        return EXACT
    missing = [package for package in ("mamba_ssm", "causal_conv1d") if not kernels_adamba.loads(package)]
    if missing and not INTERPRETED:
        pytest.skip(f"{' and '.join(missing)} not installed")
    assert not missing
    if INTERPRETED:
        decide(lambda package, tensor: tensor.dtype in kernels_adamba.KERNEL_DTYPES)
    return NEAR if ROUNDED else EXACT


def packed_positions(length: int, border: int, rows: int = 2) -> torch.Tensor:
    return torch.cat((torch.arange(border), torch.arange(length - border))).expand(rows, -1)


def pair(seed: int) -> tuple[AdambaForCausalLM, AdambaForCausalLM]:
    """The same model on the CPU in fp64, which no kernel takes, and on the GPU."""
    return hybrid(seed, **SIZES).double(), hybrid(seed, **SIZES).to(DEVICE)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.detach().float().cpu()
    return float((found.detach().float().cpu() - expected).norm() / expected.norm().clamp(min=1e-6))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("border", [None, 71])
def test_logits_and_gradients_are_those_of_the_cpu(seed: int, border: int | None, tolerance: float) -> None:
    on_cpu, on_gpu = pair(seed)
    ids = tokens(seed, length=150)  # over borders of chunks
    batch = {"input_ids": ids, "labels": ids}  # without a cache, as training runs: documents are known, kernels fused
    if border is not None:
        batch["position_ids"] = packed_positions(150, border)
    unit = 2**-11 if tolerance == NEAR else 2**-24
    for width in (None, "ghost"):
        expected = gradients(on_cpu, batch, width)
        found = gradients(on_gpu, {key: value.to(DEVICE) for key, value in batch.items()}, width)
        off = distance(found.pop("logits"), expected["logits"])
        print(f"{width or 'full width'}: logits {off:.1e}")  # pytest -rP shows it
        assert off < tolerance
        assert found.keys() == expected.keys() - {"logits"}
        drawn = [gradients(on_cpu, batch, width, unit, draw) for draw in range(4)]
        largest = max(float(grad.norm()) for name, grad in expected.items() if name != "logits")
        distances = {
            name: distance(grad, expected[name])
            for name, grad in found.items()
            if expected[name].norm() > 1e-3 * largest
        }
        worst = nlargest(2, distances.items(), itemgetter(1))
        print("gradients", *(f"{off:.1e} {name}" for name, off in worst))
        for name, off in distances.items():
            # Seed 2 packed: what tokens give to one gradient of D cancels, and 2 ** -11 moves it by a quarter.
            moved = max(distance(other[name], expected[name]) for other in drawn)
            assert off < max(3 * tolerance, 2 * moved), name


def gradients(
    model: AdambaForCausalLM, batch: dict[str, torch.Tensor], width: str | None, noise: float = 0.0, draw: int = 0
) -> dict[str, torch.Tensor]:
    """Of all that learns, and `logits`; with the `noise` of one `draw` in what Mamba mixers give, relative to it."""
    generator = torch.Generator().manual_seed(draw)

    def disturb(mixer: Mamba2Mixer, given: tuple, out: torch.Tensor) -> torch.Tensor:
        return out * (1 + noise * torch.randn(out.shape, generator=generator, dtype=out.dtype))

    mixers = [module for module in model.modules() if isinstance(module, Mamba2Mixer)] if noise else []
    hooks = [mixer.register_forward_hook(disturb) for mixer in mixers]
    model.zero_grad()
    output = model(**batch, width=width, use_cache=False)
    output.loss.backward()
    for hook in hooks:
        hook.remove()
    learned = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return learned | {"logits": output.logits.detach()}


@pytest.mark.parametrize("seed", range(3))
def test_padding_on_either_side_is_not_seen(seed: int, tolerance: float) -> None:
    model = hybrid(seed, **SIZES).to(DEVICE)
    ids = tokens(seed, length=150).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :71], mask[1, 140:] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as `generate` counts them; a gain after RoPE makes places count
    padded = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for row, real in ((0, slice(71, 150)), (1, slice(0, 140))):
        alone = model(ids[row : row + 1, real], use_cache=False).logits[0]
        assert distance(padded[row, real], alone) < tolerance


@pytest.mark.parametrize("seed", range(3))
def test_a_cache_gives_the_logits_of_the_whole(seed: int, tolerance: float) -> None:
    """A prompt, then several tokens at once, then one at a time."""
    model = hybrid(seed, **SIZES).to(DEVICE)
    ids = tokens(seed, length=90).to(DEVICE)
    whole = model(ids, use_cache=False).logits
    output, parts, place = model(ids[:, :70], use_cache=True), [], 70
    parts.append(output.logits)
    for count in (5, *[1] * 15):
        output = model(ids[:, place : place + count], past_key_values=output.past_key_values, use_cache=True)
        parts.append(output.logits)
        place += count
    assert distance(torch.cat(parts, dim=1), whole) < tolerance


@needs_gpu
@pytest.mark.parametrize("seed", range(3))
def test_decoding_gives_the_tokens_of_the_cpu(seed: int, tolerance: float) -> None:
    if tolerance == NEAR:
        pytest.skip("near ties may fall either way")
    on_cpu, on_gpu = pair(seed)
    ids = tokens(seed, length=11)
    for options in ({}, {"width": "ghost"}, {"exit_threshold": 0.4}, {"exit_threshold": 0.4, "exit_mode": "verify"}):
        expected = on_cpu.generate(ids, max_new_tokens=12, do_sample=False, **options)
        found = on_gpu.generate(ids.to(DEVICE), max_new_tokens=12, do_sample=False, **options)
        assert torch.equal(found.cpu(), expected), options


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_packed_documents_in_halves_are_each_alone(seed: int, sliding: bool, tolerance: float) -> None:
    """Torch's FlashAttention for many lengths: a leak would be far above what halves round."""
    kinds = ["sliding_attention" if sliding else "full_attention", "linear_attention"]
    changes = {"layer_types": kinds * 2, "num_hidden_layers": 4, "sliding_window": 5 if sliding else None}
    model = hybrid(seed, **SIZES, **changes).to(DEVICE)
    ids = tokens(seed, length=150).to(DEVICE)

    def alone() -> torch.Tensor:
        return torch.cat([model(part, use_cache=False).logits for part in (ids[:, :71], ids[:, 71:])], dim=1)

    exact = alone()
    leaky = distance(model(ids, use_cache=False).logits, exact)
    with torch.autocast(DEVICE, torch.bfloat16):
        rounding = distance(alone(), exact)
        packed = distance(model(ids, position_ids=packed_positions(150, 71).to(DEVICE), use_cache=False).logits, exact)
    assert packed < 1.5 * rounding and packed < leaky / 3, (packed, rounding, leaky)


@pytest.mark.parametrize("rest", [0, 3])  # a slice with strides that are multiples of eight, and not
def test_convolution_of_a_slice_is_the_plain_one(rest: int, tolerance: float) -> None:
    if tolerance == EXACT and not INTERPRETED:
        pytest.skip("no kernel to compare")
    torch.manual_seed(0)
    wide = torch.randn(2, 33, 64 + 8 + rest, device=DEVICE, requires_grad=True)
    weight, bias = torch.randn(64, 4, device=DEVICE), torch.randn(64, device=DEVICE)
    for numbers in (None, number_documents(packed_positions(33, 9).to(DEVICE))):
        results = []
        for convolve in (convolve_rows, causal_conv):
            wide.grad = None
            out = convolve(wide[..., 8:72], weight, bias, numbers)
            out.square().sum().backward()
            results.append((out, wide.grad))
        for found, expected in zip(*results, strict=True):
            assert distance(found, expected) < 1e-5


@needs_gpu
def test_compiled_layers_train_as_plain_ones(tolerance: float) -> None:
    ids = tokens(0, length=150).to(DEVICE)
    gradients = []
    for compiled in (False, True):
        model = hybrid(0, **SIZES).to(DEVICE).train()
        if compiled:
            compile_for_training(model)
        for width in ("ghost", None):
            model(ids, labels=ids, width=width, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, found = gradients
    assert plain.keys() == found.keys() and len(plain) > 20
    for name, gradient in plain.items():
        assert distance(found[name], gradient) < max(tolerance, 1e-3), name


@pytest.mark.parametrize("changes", [{"mamba_num_groups": 1, "mamba_state_size": 18}, {"mamba_conv_kernel": 6}])
def test_sizes_that_no_kernel_takes_run_in_plain_torch(changes: dict, tolerance: float) -> None:
    """Channels of the convolution that are no multiple of eight, and more taps than the kernel has."""
    on_cpu, ids = hybrid(0, **SIZES | changes), tokens(0, length=40)
    expected = on_cpu(ids, use_cache=False).logits
    assert distance(on_cpu.to(DEVICE)(ids.to(DEVICE), use_cache=False).logits, expected) < tolerance
