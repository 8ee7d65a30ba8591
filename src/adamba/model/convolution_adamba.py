"""
The causal depthwise convolution of Mamba-2, then SiLU: by `causal_conv1d` on a GPU that has it, else in plain torch.

Shape legend: B batch, L tokens, X channels, K taps, W places of a window.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_fn

from .kernels_adamba import has_kernels
from .scan_adamba import blocks


def kernel_takes(tensor: torch.Tensor, weight_XK: torch.Tensor) -> bool:
    """Whether `causal_conv1d` can convolve on this tensor's device with this weight."""
    channels, taps = weight_XK.shape
    return has_kernels("causal_conv1d", tensor) and channels % 8 == 0 and 2 <= taps <= 4


def convolve_rows(
    x_BLX: torch.Tensor, weight_XK: torch.Tensor, bias_X: torch.Tensor, document_BL: torch.Tensor | None = None
) -> torch.Tensor:
    """What `causal_conv` computes, by the kernel where there is one for this tensor."""
    if not kernel_takes(x_BLX, weight_XK):
        return causal_conv(x_BLX, weight_XK, bias_X, document_BL)
    if any(stride % 8 for stride in x_BLX.stride()[:2]):  # a slice of in_proj's output; the kernel reads vectors
        x_BLX = x_BLX.contiguous()
    out = causal_conv1d_fn(x_BLX.transpose(1, 2), weight_XK, bias_X, seq_idx=document_BL, activation="silu")
    return out.transpose(1, 2)


def causal_conv(
    x_BLX: torch.Tensor, weight_XK: torch.Tensor, bias_X: torch.Tensor, document_BL: torch.Tensor | None = None
) -> torch.Tensor:
    """
    (B, L, X): a causal depthwise convolution, then SiLU, in the input's dtype; computed in fp32 or, for fp64, fp64.

    Args:
        document_BL: a number for each document, changing at its border, over which nothing reaches.
    """
    return CausalConv.apply(x_BLX, weight_XK.t().contiguous(), bias_X, document_BL)


class CausalConv(torch.autograd.Function):
    """
    Its own backward, for what autograd would keep and refill: one padded copy of the input a tap. Rows and tokens are
    taken in blocks that stay in a core's cache, and stay channels last, as the layers around have them.
    """

    @staticmethod
    def forward(ctx, x_BLX, taps_KX, bias_X, document_BL):
        ctx.save_for_backward(x_BLX, taps_KX, bias_X, document_BL)
        dtype = torch.promote_types(x_BLX.dtype, torch.float32)
        taps_KX, bias_X = taps_KX.to(dtype), bias_X.to(dtype)
        y_BLX = torch.empty_like(x_BLX, memory_format=torch.contiguous_format)
        for rows, tokens in blocks(x_BLX, 1, x_BLX.shape[-1]):
            seen = _seen(taps_KX, tokens)
            x, document = x_BLX[rows, seen].to(dtype), _of(document_BL, rows, seen)
            y_BLX[rows, tokens] = F.silu(_taps(x, taps_KX, bias_X, document, tokens.start - seen.start))
        return y_BLX

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLX):
        x_BLX, taps_KX, bias_X, document_BL = ctx.saved_tensors
        dtype = torch.promote_types(x_BLX.dtype, torch.float32)
        taps, bias = taps_KX.to(dtype), bias_X.to(dtype)
        grad_x = torch.empty_like(x_BLX, dtype=dtype, memory_format=torch.contiguous_format)
        grad_taps, grad_bias = torch.zeros_like(taps), torch.zeros_like(bias)
        for rows, tokens in blocks(x_BLX, 1, x_BLX.shape[-1]):
            seen = _seen(taps, tokens)
            x, document, out = x_BLX[rows, seen].to(dtype), _of(document_BL, rows, seen), grad_x[rows, seen]
            before = tokens.start - seen.start
            grad = torch.ops.aten.silu_backward(
                grad_BLX[rows, tokens].to(dtype), _taps(x, taps, bias, document, before)
            )
            grad_bias += grad.sum((0, 1))
            grad_taps[-1] += (grad * x[:, before:]).sum((0, 1))
            torch.mul(grad, taps[-1], out=out[:, before:])
            for back, first, source, crosses in _reaches(taps, x.shape[1], document, before):
                reached = grad[:, first:] if crosses is None else grad[:, first:].masked_fill(crosses, 0.0)
                # Tokens of the block before already have what their own block gave them.
                out[:, source].addcmul_(reached, taps[-1 - back])
                grad_taps[-1 - back] += (reached * x[:, source]).sum((0, 1))
        return grad_x.to(x_BLX.dtype), grad_taps.to(taps_KX.dtype), grad_bias.to(bias_X.dtype), None


def _seen(taps_KX: torch.Tensor, tokens: slice) -> slice:
    """A block's tokens and those before them that its taps reach."""
    return slice(max(0, tokens.start - taps_KX.shape[0] + 1), tokens.stop)


def _of(document_BL: torch.Tensor | None, rows: slice, seen: slice) -> torch.Tensor | None:
    return None if document_BL is None else document_BL[rows, seen]


def _taps(x_BLX, taps_KX, bias_X, document_BL: torch.Tensor | None, before: int) -> torch.Tensor:
    """
    The convolution, before SiLU, of all tokens but the first `before`, which are only reached. What another document
    has is replaced by zero, not multiplied.
    """
    out = torch.addcmul(bias_X, x_BLX[:, before:], taps_KX[-1])
    for back, first, source, crosses in _reaches(taps_KX, x_BLX.shape[1], document_BL, before):
        if crosses is None:
            out[:, first:].addcmul_(x_BLX[:, source], taps_KX[-1 - back])
        else:
            out[:, first:] += (x_BLX[:, source] * taps_KX[-1 - back]).masked_fill_(crosses, 0.0)
    return out


def _reaches(
    taps_KX: torch.Tensor, length: int, document_BL: torch.Tensor | None, before: int
) -> Iterator[tuple[int, int, slice, torch.Tensor | None]]:
    """
    For each earlier tap: how far back it lies, the first token after `before` that has such a predecessor, the
    predecessors, and (B, tokens, 1) whether they belong to another document.
    """
    for back in range(1, taps_KX.shape[0]):
        first = max(0, back - before)
        source = slice(before + first - back, length - back)
        if source.start >= source.stop:
            continue
        crosses = None
        if document_BL is not None:
            crosses = (document_BL[:, before + first :] != document_BL[:, source])[..., None]
        yield back, first, source, crosses


def short_conv(window_BXW: torch.Tensor, weight_XK: torch.Tensor, bias_X: torch.Tensor) -> torch.Tensor:
    """The causal convolution, then SiLU, of the last W - K + 1 places of a short window; cheaper than `conv1d`."""
    if window_BXW.shape[-1] == weight_XK.shape[1]:
        return F.silu((window_BXW * weight_XK).sum(-1).add_(bias_X)).unsqueeze(-1)
    seen_BXLK = window_BXW.unfold(-1, weight_XK.shape[1], 1)
    return F.silu((seen_BXLK * weight_XK[:, None]).sum(-1) + bias_X[:, None])
