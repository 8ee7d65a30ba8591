"""
The causal depthwise convolution of Mamba-2, then SiLU, in plain torch.

Shape legend: B batch, L tokens, X channels, K taps, W places of a window.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .scan_adamba import row_blocks


def causal_conv(
    x_BLX: torch.Tensor, weight_XK: torch.Tensor, bias_X: torch.Tensor, document_BL: torch.Tensor
) -> torch.Tensor:
    """
    (B, L, X): a causal depthwise convolution, then SiLU, that does not reach over document borders.

    Args:
        document_BL: a number for each document, changing at its border.
    """
    return CausalConv.apply(x_BLX, weight_XK.t().contiguous(), bias_X, document_BL)


class CausalConv(torch.autograd.Function):
    """
    Its own backward, for what autograd would keep and refill: one padded copy of the input a tap. Rows are taken in
    blocks that stay in a core's cache.
    """

    @staticmethod
    def forward(ctx, x_BLX, taps_KX, bias_X, document_BL):
        ctx.save_for_backward(x_BLX, taps_KX, bias_X, document_BL)
        y_BLX = torch.empty_like(x_BLX, memory_format=torch.contiguous_format)
        for rows in row_blocks(x_BLX):
            torch.ops.aten.silu.out(_taps(x_BLX[rows], taps_KX, bias_X, document_BL[rows]), out=y_BLX[rows])
        return y_BLX

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLX):
        x_BLX, taps_KX, bias_X, document_BL = ctx.saved_tensors
        grad_x = torch.empty_like(x_BLX, memory_format=torch.contiguous_format)
        grad_taps = torch.zeros_like(taps_KX)
        grad_bias = torch.zeros_like(bias_X)
        for rows in row_blocks(x_BLX):
            x, document, out = x_BLX[rows], document_BL[rows], grad_x[rows]
            grad = torch.ops.aten.silu_backward(grad_BLX[rows], _taps(x, taps_KX, bias_X, document))
            grad_bias += grad.sum((0, 1))
            grad_taps[-1] += (grad * x).sum((0, 1))
            torch.mul(grad, taps_KX[-1], out=out)
            for back in range(1, min(taps_KX.shape[0], x.shape[1])):
                reached = grad[:, back:].masked_fill(_crosses(document, back), 0.0)
                out[:, :-back].addcmul_(reached, taps_KX[-1 - back])
                grad_taps[-1 - back] += reached.mul_(x[:, :-back]).sum((0, 1))
        return grad_x, grad_taps, grad_bias, None


def _taps(x_BLX: torch.Tensor, taps_KX: torch.Tensor, bias_X: torch.Tensor, document_BL: torch.Tensor) -> torch.Tensor:
    """The convolution itself, before SiLU. What lies in another document is replaced by zero, not multiplied by it."""
    out = torch.addcmul(bias_X, x_BLX, taps_KX[-1])
    for back in range(1, min(taps_KX.shape[0], x_BLX.shape[1])):
        shifted = x_BLX[:, :-back] * taps_KX[-1 - back]
        out[:, back:] += shifted.masked_fill_(_crosses(document_BL, back), 0.0)
    return out


def _crosses(document_BL: torch.Tensor, back: int) -> torch.Tensor:
    """(B, L - back, 1): whether the place `back` tokens earlier belongs to another document."""
    return (document_BL[:, back:] != document_BL[:, :-back])[..., None]


def short_conv(window_BXW: torch.Tensor, weight_XK: torch.Tensor, bias_X: torch.Tensor) -> torch.Tensor:
    """The causal convolution, then SiLU, of the last W - K + 1 places of a short window; cheaper than `conv1d`."""
    seen_BXLK = window_BXW.unfold(-1, weight_XK.shape[1], 1)
    return F.silu((seen_BXLK * weight_XK[:, None]).sum(-1) + bias_X[:, None])
