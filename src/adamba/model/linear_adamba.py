"""
Linear layers in fp32 training on an AMD processor: with large weights by oneDNN.

torch gives products in fp32 to MKL, which on an AMD EPYC (Zen 4) does 85 to 95 GFLOP/s a core, where oneDNN, torch's
library for bf16, does 99 to 109 in the same precision. Gradients of weights gain less, and only in some shapes; they
stay with MKL, as do other processors and sizes. `python bench/training_step.py` measures whole steps.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

LARGE = 2**17  # numbers of a weight
MANY = 32  # tokens; for a few, as a step of decoding has, oneDNN takes longer to be called than it saves


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, training: bool) -> torch.Tensor:
    """
    `F.linear`: (..., in), (out, in) and (out) -> (..., out). Whether a layer trains and not whether gradients are on
    decides: reentrant checkpointing computes a layer without and again with them, and has to find the same numbers.
    """
    if training and bias is None and _takes_onednn(x, weight):
        return OneDNNLinear.apply(x, weight)
    return F.linear(x, weight, bias)


def _takes_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if torch.compiler.is_compiling():  # first: a look at the tokens would bind what is compiled to their number
        return False
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.numel() >= LARGE
        and x.shape[:-1].numel() >= MANY
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
    )


@cache
def onednn_is_faster() -> bool:
    """On AMD processors with AVX-512, as far as is known; the operation has no public name, so it may also be gone."""
    processor = Path("/proc/cpuinfo")
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and processor.exists()
        and "AuthenticAMD" in processor.read_text()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad
        grad_x = _product(grad, weight.T) if wants_x else None
        grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2) if wants_weight else None
        return grad_x, grad_weight


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(..., in) and (out, in) -> (..., out)."""
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()  # a narrower width: for rows with gaps oneDNN has nothing but its slow reference
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
