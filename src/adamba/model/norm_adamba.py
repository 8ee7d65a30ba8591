"""
Norms with their own forward and backward pass for a CPU: they keep their inputs and nothing else of that size, and go
through them a block at a time, which a core's cache holds, where autograd has a pass over memory for each operation.

`rms_norm` is torch's norm. `GatedRMSNorm` is Mamba-2's: `norm(y · silu(gate)) · weight`, one statistic a group.

Shape legend: T tokens, G groups, C channels of a group.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from .scan_adamba import BLOCK_SIZE, blocks


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`F.rms_norm` of fp32 or fp64 over the last dimension; in training on a CPU in blocks, with the same bits."""
    trains = x.device.type == "cpu" and torch.is_grad_enabled()
    if not trains or x.numel() <= BLOCK_SIZE or torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return BlockRMSNorm.apply(x.reshape(1, -1, x.shape[-1]), weight, eps).view(x.shape)


class BlockRMSNorm(torch.autograd.Function):
    """The operations of autograd, each in its place, so that a step's bits do not depend on where it takes blocks."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = x.new_empty(*x.shape[:-1], 1)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for block in blocks(x, 1, x.shape[-1]):
            scale[block] = torch.rsqrt(x[block].pow(2).mean(-1, keepdim=True).add_(eps))
            torch.mul(x[block], scale[block], out=out[block])
            if weight is not None:
                out[block] *= weight
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        by_token = None if weight is None else torch.empty_like(grad_x)
        for block in blocks(x, 1, x.shape[-1]):
            own, to_normed = x[block], grad[block]
            if by_token is not None:
                torch.mul(to_normed, own * scale[block], out=by_token[block])
                to_normed = to_normed * weight
            to_scale = (to_normed * own).sum(-1, keepdim=True)
            to_mean = to_scale.mul_(-0.5).mul_(scale[block].pow(3)).div_(x.shape[-1])
            torch.mul(to_normed, scale[block], out=grad_x[block]).add_(own.mul(2).mul_(to_mean))
        # At once: sums of blocks would be rounded elsewhere than autograd's one sum over all tokens.
        return grad_x, None if by_token is None else by_token.sum((0, 1)), None


class GatedRMSNorm(MambaRMSNormGated):
    """transformers' norm: its weight and, on a GPU, its forward."""

    def forward(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """(..., channels) twice -> the same shape in `y`'s dtype; computed in fp32 or, for fp64, fp64."""
        if y.is_cuda:
            return super().forward(y, gate)
        if not torch.is_grad_enabled() and y.numel() <= BLOCK_SIZE:  # nothing to keep, and nothing to cut
            dtype = torch.promote_types(y.dtype, torch.float32)
            product = (y.to(dtype) * F.silu(gate.to(dtype))).unflatten(-1, (-1, self.group_size))
            normed = F.rms_norm(product, (self.group_size,), eps=self.variance_epsilon)
            return normed.view(y.shape).to(y.dtype) * self.weight
        flat = (part.reshape(1, -1, part.shape[-1]) for part in (y, gate))
        return GatedNorm.apply(*flat, self.weight, self.group_size, self.variance_epsilon).view(y.shape)


class GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, gate, weight, group_size, eps):
        ctx.save_for_backward(y, gate, weight)
        ctx.group_size, ctx.eps = group_size, eps
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        for _, tokens in blocks(y, 1, y.shape[-1]):
            normed, _, _ = _normed(y[0, tokens], gate[0, tokens], group_size, eps)
            out[0, tokens] = normed.flatten(1).to(y.dtype) * weight
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, gate, weight = ctx.saved_tensors
        dtype = torch.promote_types(y.dtype, torch.float32)
        grad_y, grad_gate = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (y, gate))
        grad_weight = torch.zeros_like(weight, dtype=dtype)
        for _, tokens in blocks(y, 1, y.shape[-1]):
            own_y, own_gate = y[0, tokens].to(dtype), gate[0, tokens].to(dtype)
            normed_TGC, scale_TG1, silu = _normed(own_y, own_gate, ctx.group_size, ctx.eps)
            to_out = grad[0, tokens].to(dtype)
            grad_weight += (to_out * normed_TGC.flatten(1)).sum(0)
            to_normed = (to_out * weight).view(normed_TGC.shape)
            shared = (to_normed * normed_TGC).mean(-1, keepdim=True)
            to_product = to_normed.addcmul_(normed_TGC, shared, value=-1).mul_(scale_TG1).flatten(1)
            grad_y[0, tokens] = to_product * silu
            grad_gate[0, tokens] = torch.ops.aten.silu_backward(to_product * own_y, own_gate)
        return grad_y, grad_gate, grad_weight.to(weight.dtype), None, None


def _normed(y: torch.Tensor, gate: torch.Tensor, group_size: int, eps: float):
    """The normed product (T, G, C), what it was scaled by (T, G, 1), and silu(gate) (T, channels)."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    silu = F.silu(gate.to(dtype))
    product = (y.to(dtype) * silu).unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(product.pow(2).mean(-1, keepdim=True) + eps)
    return product * scale, scale, silu
