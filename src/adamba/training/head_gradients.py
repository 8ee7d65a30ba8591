"""
The head's losses with their gradient made along, so that neither logits wait for the backward pass nor are made again.

The gradient of a token's cross entropy by its logits is p - onehot(label), that of KL(t || p) is p - t: both are known
as soon as the logits are, and after two products (with the weight, and with the states) a chunk of logits can go. The
idea is Liger Kernel's (Hsu et al., 2024, section 3.2), which has no divergence from a second head and no choices.

Shape legend: T tokens with a label, D hidden channels, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

Reduced = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Weights(NamedTuple):
    """What cross entropy and divergence count in the total of one pass."""

    loss: float = 1.0
    divergence: float = 0.0


LOSS_ALONE = Weights()


def total_with_gradients(
    states_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_T: torch.Tensor,
    targets_TD: torch.Tensor | None,
    weights: Weights,
    size: int,
    reduce: Callable[..., Reduced],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Total, cross entropy (T,), likeliest tokens (T,) and summed divergence, `size` tokens at a time. The total alone
    has a gradient, for states and weight; what is kept for it is as large as they are. Products run in autocast's
    type.

    Args:
        targets_TD: states of the distributions that the divergence is from; `None`: there is none.
        reduce: `reduce_with_gradient`, or its compiled twin.
    """
    device = states_TD.device.type
    mixed = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if mixed else weight_VD.dtype
    with torch.autocast(device, enabled=False):
        return _HeadTotal.apply(states_TD, weight_VD, labels_T, targets_TD, weights, size, dtype, reduce)


class _HeadTotal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states_TD, weight_VD, labels_T, targets_TD, weights, size, dtype, reduce):
        wants_states, wants_weight, *_ = ctx.needs_input_grad
        product_VD = weight_VD.to(dtype)
        by_states = torch.empty_like(states_TD, dtype=dtype) if wants_states else None
        by_weight = torch.zeros_like(weight_VD) if wants_weight else None
        factors = torch.tensor(weights, dtype=torch.float32, device=states_TD.device).unbind()
        all_losses, all_choices, divergence = [], [], torch.zeros_like(factors[0])
        for start in range(0, len(states_TD), size):
            chunk = slice(start, start + size)
            states = states_TD[chunk].to(dtype)
            targets = [] if targets_TD is None else [targets_TD[chunk].to(dtype) @ product_VD.T]
            losses, choices, added, gradient = reduce([states @ product_VD.T], labels_T[chunk], targets, *factors)
            all_losses.append(losses)
            all_choices.append(choices)
            divergence = divergence + added
            if by_states is not None:
                torch.mm(gradient, product_VD, out=by_states[chunk])
            if by_weight is not None:
                by_weight += gradient.T @ states
        ctx.save_for_backward(by_states, by_weight)
        ctx.states_dtype = states_TD.dtype
        losses_T, choices_T = torch.cat(all_losses), torch.cat(all_choices)
        ctx.mark_non_differentiable(losses_T, choices_T, divergence)
        total = weights.loss * losses_T.sum() + weights.divergence * divergence
        return total, losses_T, choices_T, divergence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor, *_):
        by_states, by_weight = ctx.saved_tensors
        return (
            None if by_states is None else (by_states * factor).to(ctx.states_dtype),
            None if by_weight is None else by_weight * factor,
            *[None] * 6,
        )


def reduce_with_gradient(
    logits: list[torch.Tensor],
    labels_T: torch.Tensor,
    targets: list[torch.Tensor],
    loss_weight: torch.Tensor,
    divergence_weight: torch.Tensor,
) -> Reduced:
    """
    Cross entropy (T,), likeliest tokens (T,), the summed divergence from `targets` and the gradient (T, V) of their
    weighted sum by the logits, in the logits' type; all computed in fp32. Logits (T, V) come in lists of at most one,
    which are emptied: an argument would live until the end, beside what is made of it. Weights are tensors without a
    dimension: for each number all would be compiled anew.
    """
    dtype = logits[0].dtype
    log_probabilities = logits.pop().float().log_softmax(-1)
    log_target = targets.pop().float().log_softmax(-1) if targets else None
    losses, choices, divergence = measures(log_probabilities, labels_T, log_target)
    is_label = torch.arange(log_probabilities.shape[-1], device=labels_T.device) == labels_T[:, None]
    if log_target is None:
        gradient = log_probabilities.exp_().mul_(loss_weight)
    else:
        gradient = log_probabilities.exp_().mul_(loss_weight + divergence_weight)
        gradient.sub_(log_target.exp_().mul_(divergence_weight))
    return losses, choices, divergence, gradient.sub_(is_label * loss_weight).to(dtype)


def measures(
    log_probabilities: torch.Tensor, labels_T: torch.Tensor, log_target: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy (T,), likeliest tokens (T,) and the summed divergence from the target, of what is (T, V)."""
    losses = F.nll_loss(log_probabilities, labels_T, reduction="none")
    divergence = losses.new_zeros(())
    if log_target is not None:
        divergence = F.kl_div(log_probabilities, log_target, reduction="sum", log_target=True)
    return losses, log_probabilities.argmax(-1), divergence
