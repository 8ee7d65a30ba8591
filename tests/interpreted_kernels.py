"""
The kernels of `mamba_ssm` without a GPU: a pytest plugin that runs them, as they are, in Triton's interpreter.

    make test-kernels

What the layers ask of the kernels (packed documents, padding, strides, chunks, gradients) is then compared with plain
torch. `causal_conv1d` is CUDA, so its extension is replaced by what it computes and what it refuses. With
`ROUNDING=tf32` products round as on a GPU's tensor cores, which drop 13 of 23 bits of what they multiply.
"""

import contextlib
import functools
import os
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F
import triton
from triton import language
from triton.runtime import interpreter

ROUNDING = os.environ.get("ROUNDING", "none")


class NoDevice(contextlib.nullcontext):
    """In place of `torch.cuda.device`, around each launch."""

    def __init__(self, index: int | None):
        super().__init__()


def install() -> None:
    torch.cuda.device = NoDevice
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(multi_processor_count=4)
    triton.autotune = functools.partial(without_tuning, triton.autotune)
    interpreter.InterpreterBuilder.create_dot = create_dot
    sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")  # Mamba-1's, which nothing here calls
    sys.modules["causal_conv1d_cuda"] = convolutions = types.ModuleType("causal_conv1d_cuda")
    for function in (causal_conv1d_fwd, causal_conv1d_bwd, causal_conv1d_update):
        setattr(convolutions, function.__name__, function)


def without_tuning(autotune, configs: list, *arguments, **options):
    return autotune(configs[:1], *arguments, **options)


def create_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    """The interpreter multiplies the bits of bf16, which it keeps as integers, and never rounds to TF32."""
    return interpreter.TensorHandle(np.matmul(factor(a), factor(b)) + d.data, d.dtype.scalar)


def factor(handle) -> np.ndarray:
    if handle.dtype.scalar == language.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    if ROUNDING == "tf32" and handle.dtype.scalar == language.float32:
        return (np.ascontiguousarray(handle.data).view(np.uint32) & 0xFFFFE000).view(np.float32)
    return handle.data.astype(np.float32)


def refuse_strides(*tensors_BXL: torch.Tensor) -> None:
    """Channels last are read in vectors of eight (csrc/causal_conv1d.cpp of Dao-AILab/causal-conv1d)."""
    for tensor in tensors_BXL:
        assert tensor.stride(1) == 1 or tensor.stride(2) == 1, tensor.stride()
        if tensor.stride(1) == 1 and tensor.stride(2) > 1:
            assert tensor.shape[1] % 8 == tensor.stride(0) % 8 == tensor.stride(2) % 8 == 0, tensor.stride()


def reached(x_BXL: torch.Tensor, back: int, document_BL: torch.Tensor | None) -> torch.Tensor:
    """Each token's predecessor `back` places before, zero where that is another document's or before the row."""
    x = F.pad(x_BXL.float(), (back, 0))[..., : x_BXL.shape[-1]]
    if document_BL is None:
        return x
    assert document_BL.dtype == torch.int32 and document_BL.is_contiguous() and x_BXL.stride(1) == 1
    same = F.pad(document_BL, (back, 0), value=-1)[..., : x_BXL.shape[-1]] == document_BL
    return torch.where(same[:, None], x, 0.0)


def convolved(x_BXL, weight_XK, bias_X, document_BL) -> torch.Tensor:
    """Before the activation."""
    assert 2 <= weight_XK.shape[1] <= 4
    taps = weight_XK.float().unbind(1)[::-1]
    return sum(reached(x_BXL, back, document_BL) * tap[:, None] for back, tap in enumerate(taps)) + bias_X[:, None]


def causal_conv1d_fwd(x, weight, bias, seq_idx, initial_states, out, final_states, silu) -> None:
    assert initial_states is None and final_states is None and silu
    refuse_strides(x)
    out.copy_(F.silu(convolved(x, weight, bias, seq_idx)))


def causal_conv1d_bwd(x, weight, bias, dout, seq_idx, initial, dfinal, dx, dweight, dbias, dinitial, silu) -> None:
    assert initial is None and silu
    refuse_strides(x, dout, dx)
    grad = torch.ops.aten.silu_backward(dout.float(), convolved(x, weight, bias, seq_idx))
    ones, grad_x = torch.ones_like(x, dtype=torch.float32), torch.zeros_like(x, dtype=torch.float32)
    for back, tap in enumerate(weight.float().unbind(1)[::-1]):
        dweight[:, -1 - back] += (grad * reached(x, back, seq_idx)).sum((0, 2))
        seen = grad * reached(ones, back, seq_idx) * tap[:, None]
        grad_x[..., : x.shape[-1] - back] += seen[..., back:]
    dbias += grad.sum((0, 2))
    dx.copy_(grad_x)


def causal_conv1d_update(x, conv_state, weight, bias, out, silu, cache_seqlens, conv_state_indices) -> None:
    assert cache_seqlens is None and conv_state_indices is None and silu
    window = torch.cat((conv_state, x), dim=-1)
    out.copy_(F.silu(convolved(window.float(), weight, bias, None))[..., -x.shape[-1] :])
    conv_state.copy_(window[..., -conv_state.shape[-1] :])


install()
