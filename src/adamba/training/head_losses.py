"""
What the shared head says of a layer's hidden states: cross entropy, divergence and choices, some tokens at a time.

At a vocabulary of 65,536 the fp32 logits of 16,384 tokens take 4 GiB, and a plain backward pass holds several copies
for each width and each exit. Here only tokens that have a label meet the head; where they are many, in chunks, whose
gradient `head_gradients` makes at once. Where the head is more than one product (a soft cap, an adapter, weights that
are gathered when they are used) a chunk is computed again in the backward pass instead.

Shape legend: B rows, L tokens, T tokens with a label, D hidden channels, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from adamba.model import AdambaForCausalLM
from adamba.training.head_gradients import LOSS_ALONE, Weights, measures, reduce_with_gradient, total_with_gradients

IGNORED = -100
# In fp32 64 MiB, which a CPU's caches and memory like, and 512 MiB: a GPU wants large products.
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}

Head = Callable[[torch.Tensor], torch.Tensor]


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Next-token cross entropy in nats of logits that are there, (B, L - 1), zero where the label is ignored."""
    targets = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(targets.shape)


@dataclass
class HeadLosses:
    """
    total: the weighted sum of losses and divergence, which alone has a gradient. losses (B, L - 1): next-token cross
    entropy in nats; choices (B, L - 1): the likeliest next tokens; both 0 without a label. divergence: the sum of
    KL(target || this) over labelled tokens. states (T, D): what met the head.
    """

    total: torch.Tensor
    losses: torch.Tensor
    choices: torch.Tensor
    divergence: torch.Tensor
    states: torch.Tensor


def head_losses(
    model: AdambaForCausalLM,
    hidden_BLD: torch.Tensor,
    labels_BL: torch.Tensor,
    target: HeadLosses | None = None,
    weights: Weights = LOSS_ALONE,
) -> HeadLosses:
    """
    Args:
        hidden_BLD: a layer's output, before the final norm.
        labels_BL: not shifted; -100 is no label.
        target: of the same labels; the divergence is from its distribution, which gets no gradient.
        weights: of losses and divergence in the total.
    """
    counted = labels_BL[:, 1:] != IGNORED
    states_TD = model.model.norm(hidden_BLD[:, :-1][counted])
    size = max(1, LOGITS_AT_ONCE.get(states_TD.device.type, LOGITS_AT_ONCE["cpu"]) // model.config.vocab_size)
    return _in_chunks(model, model.head, states_TD, labels_BL[:, 1:], counted, target, weights, size)


def run_to_head(
    model,
    plain: AdambaForCausalLM,
    inputs: dict,
    labels,
    exit_layers=(),
    target: HeadLosses | None = None,
    weights: Weights = LOSS_ALONE,
    **options,
):
    """
    One pass that stops before the head: what the head says (`HeadLosses`), and the model's output, whose
    `exit_hidden_states` are those of `exit_layers` and of the last layer. `model` may be a wrapper of `plain`.

    FSDP gathers the head's weight for the model's own forward only, so there all logits are made, by the model.
    """
    layers = [*exit_layers, plain.config.num_hidden_layers - 1]
    whole = isinstance(plain, FSDPModule)
    options |= {"use_cache": False, "exit_hidden_layers": layers, "logits_to_keep": 0 if whole else 1}
    output = model(**inputs, **options)
    if not whole:
        return head_losses(plain, output.exit_hidden_states[-1], labels, target, weights), output
    counted = labels[:, 1:] != IGNORED
    logits_TV = output.logits[:, :-1][counted]
    size = max(1, len(logits_TV))
    return _in_chunks(plain, nn.Identity(), logits_TV, labels[:, 1:], counted, target, weights, size), output


def next_token_losses(
    model, plain: PreTrainedModel, inputs: dict, labels, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Next-token cross entropy of one pass, the sum, which has a gradient, and each (B, L - 1); from logits where the
    model is not ours (a dense base).
    """
    if isinstance(plain, AdambaForCausalLM):
        said = run_to_head(model, plain, inputs, labels, **options)[0]
        return said.total, said.losses
    losses = token_losses(model(**inputs, use_cache=False, **options).logits, labels)
    return losses.sum(), losses.detach()


def _in_chunks(
    model, head: Head, states_TD, labels, counted, target: HeadLosses | None, weights: Weights, size: int
) -> HeadLosses:
    """`size` tokens at a time; `labels` and `counted` are (B, L - 1)."""
    labels_T, targets_TD = labels[counted], None if target is None else target.states.detach()
    num_chunks = max(1, -(-len(states_TD) // size))  # without a label too, so that every rank runs the head
    if is_deepspeed_zero3_enabled():
        num_chunks = largest_of_all(num_chunks, states_TD.device)

    def placed(values_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return values_T.new_zeros(counted.shape, dtype=dtype).masked_scatter(counted, values_T)

    if num_chunks > 1 and states_TD.requires_grad and _is_one_product(model):
        reduce = getattr(model, "reduce_with_gradient", reduce_with_gradient)  # or its compiled twin
        total, losses_T, choices_T, divergence = total_with_gradients(
            states_TD, model.lm_head.weight, labels_T, targets_TD, weights, size, reduce
        )
        losses, choices = placed(losses_T, torch.float32), placed(choices_T, labels_T.dtype)
        return HeadLosses(total, losses, choices, divergence, states_TD)
    run = partial(_of_chunk, head, getattr(model, "reduce_logits", reduce_logits))  # or its compiled twin
    if num_chunks > 1:
        run = partial(checkpoint, run, use_reentrant=False)
    starts = range(0, num_chunks * size, size)
    parts = [
        run(*(None if t is None else t[start : start + size] for t in (states_TD, labels_T, targets_TD)))
        for start in starts
    ]
    all_losses, all_choices, divergences = zip(*parts, strict=True)
    losses, divergence = placed(torch.cat(all_losses), torch.float32), torch.stack(divergences).sum()
    total = weights.loss * losses.sum() + weights.divergence * divergence
    choices = placed(torch.cat(all_choices), labels_T.dtype)
    return HeadLosses(total, losses.detach(), choices, divergence.detach(), states_TD)


def _is_one_product(model: AdambaForCausalLM) -> bool:
    """Whether logits are states times the head's weight, which is whole wherever it is read."""
    if isinstance(model, FSDPModule) or is_deepspeed_zero3_enabled():
        return False
    return type(model.lm_head) is nn.Linear and model.config.logit_softcap is None


def largest_of_all(number: int, device: torch.device) -> int:
    """
    Over all processes. ZeRO-3 gathers the head's weight each time that it runs, forward and backward: a process with
    fewer labels that ran it less often would leave the others waiting.
    """
    numbers = torch.tensor(number, device=device)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return int(numbers)


def _of_chunk(head: Head, reduce, states_TD, labels_T, targets_TD) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    targets: list[torch.Tensor] = []
    if targets_TD is not None:
        with torch.no_grad():
            targets.append(head(targets_TD))
    return reduce([head(states_TD)], labels_T, targets)


def reduce_logits(
    logits: list[torch.Tensor], labels_T: torch.Tensor, targets: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Cross entropy (T,), likeliest tokens (T,) and the summed divergence from `targets`, computed in fp32. Logits (T, V)
    come in lists of at most one, which are emptied: an argument would live until the end, beside what is made of it.
    """
    log_probabilities = logits.pop().float().log_softmax(-1)
    log_target = targets.pop().float().log_softmax(-1) if targets else None
    return measures(log_probabilities, labels_T, log_target)
