"""
What the shared head says of a layer's hidden states: cross entropy, divergence and choices, some tokens at a time.

At a vocabulary of 65,536 the fp32 logits of 16,384 tokens take 4 GiB, and a plain backward pass holds several copies
for each width and each exit. Here only tokens that have a label meet the head; where they are many, in chunks that are
computed again in the backward pass: one product more, and never more than a chunk of logits at once.

Shape legend: B rows, L tokens, T tokens with a label, D hidden channels.
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
    losses (B, L - 1): next-token cross entropy in nats; choices (B, L - 1): the likeliest next tokens; both 0 without
    a label. divergence: the sum of KL(target || this) over labelled tokens. states (T, D): what met the head.
    """

    losses: torch.Tensor
    choices: torch.Tensor
    divergence: torch.Tensor
    states: torch.Tensor


def head_losses(
    model: AdambaForCausalLM, hidden_BLD: torch.Tensor, labels_BL: torch.Tensor, target: HeadLosses | None = None
) -> HeadLosses:
    """
    Args:
        hidden_BLD: a layer's output, before the final norm.
        labels_BL: not shifted; -100 is no label.
        target: of the same labels; the divergence is from its distribution, which gets no gradient.
    """
    counted = labels_BL[:, 1:] != IGNORED
    states_TD = model.model.norm(hidden_BLD[:, :-1][counted])
    size = max(1, LOGITS_AT_ONCE.get(states_TD.device.type, LOGITS_AT_ONCE["cpu"]) // model.config.vocab_size)
    return _in_chunks(model, model.head, states_TD, labels_BL[:, 1:], counted, target, size)


def run_to_head(model, plain: AdambaForCausalLM, inputs: dict, labels, exit_layers=(), target=None, **options):
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
        return head_losses(plain, output.exit_hidden_states[-1], labels, target), output
    counted = labels[:, 1:] != IGNORED
    logits_TV = output.logits[:, :-1][counted]
    size = max(1, len(logits_TV))
    return _in_chunks(plain, nn.Identity(), logits_TV, labels[:, 1:], counted, target, size), output


def next_token_losses(model, plain: PreTrainedModel, inputs: dict, labels, **options) -> torch.Tensor:
    """Next-token cross entropy (B, L - 1) of one pass; from logits where the model is not ours (a dense base)."""
    if isinstance(plain, AdambaForCausalLM):
        return run_to_head(model, plain, inputs, labels, **options)[0].losses
    return token_losses(model(**inputs, use_cache=False, **options).logits, labels)


def _in_chunks(model, head: Head, states_TD, labels, counted, target: HeadLosses | None, size: int) -> HeadLosses:
    """`size` tokens at a time; `labels` and `counted` are (B, L - 1)."""
    labels_T, targets_TD = labels[counted], None if target is None else target.states.detach()
    run = partial(_of_chunk, head, getattr(model, "reduce_logits", reduce_logits))  # or its compiled twin
    num_chunks = max(1, -(-len(states_TD) // size))  # without a label too, so that every rank runs the head
    if is_deepspeed_zero3_enabled():
        num_chunks = largest_of_all(num_chunks, states_TD.device)
    if num_chunks > 1:
        run = partial(checkpoint, run, use_reentrant=False)
    starts = range(0, num_chunks * size, size)
    parts = [
        run(*(None if t is None else t[start : start + size] for t in (states_TD, labels_T, targets_TD)))
        for start in starts
    ]
    losses, choices, divergences = zip(*parts, strict=True)
    return HeadLosses(
        losses=states_TD.new_zeros(counted.shape, dtype=torch.float32).masked_scatter(counted, torch.cat(losses)),
        choices=labels_T.new_zeros(counted.shape).masked_scatter(counted, torch.cat(choices)),
        divergence=torch.stack(divergences).sum(),
        states=states_TD,
    )


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
    losses = F.nll_loss(log_probabilities, labels_T, reduction="none")
    divergence = losses.new_zeros(())
    if targets:
        target = targets.pop().float().log_softmax(-1)
        divergence = F.kl_div(log_probabilities, target, reduction="sum", log_target=True)
    return losses, log_probabilities.argmax(-1), divergence
