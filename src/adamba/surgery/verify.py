"""Every surgery ends here: the same states and logits before and after, on real tokens, or nothing is saved."""

import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from .fetching import Together

TOLERANCE = 1e-4  # largest absolute logit difference in fp32 (DESIGN, section 4)


class SurgeryError(ValueError):
    """The model after surgery does not compute what it computed before."""


@dataclass(frozen=True)
class Comparison:
    """
    One width: the largest logit difference, whether every argmax agrees, the losses (nats per token), and for each
    layer that both models have the largest difference of the residual stream, as a share of its size if above 1.
    """

    width: int | None
    max_abs_logit_diff: float
    argmax_identical: bool
    loss_before: float
    loss_after: float
    layer_differences: list[float] = field(default_factory=list)


@torch.no_grad()
def compare(
    before,
    after,
    input_ids: torch.Tensor,
    widths: list[int | None],
    layers: Sequence[tuple[nn.Module, nn.Module]] = (),
    together: Together | None = None,
) -> list[Comparison]:
    """
    `before` and `after` on `input_ids` (B, L), at each width; `None` calls both without a width (a dense base).

    Args:
        layers: pairs of layers, (of before, of after), whose outputs are compared too, on the first row.
        together: with which `attach` was called; so many widths at a time.
    """
    comparisons = []
    together = together or Together()
    for start in range(0, len(widths), together.calls):
        group = widths[start : start + together.calls]
        first = _run(before, [layer for layer, _ in layers], input_ids, group, together)
        second = _run(after, [layer for _, layer in layers], input_ids, group, together)
        for width, (one, one_states), (other, other_states) in zip(group, first, second, strict=True):
            states = [_compare_states(*pair) for pair in zip(one_states, other_states, strict=True)]
            comparisons.append(_compare_logits(width, one, other, input_ids, states))
    return comparisons


def _run(
    model, layers: Sequence[nn.Module], input_ids: torch.Tensor, widths: list[int | None], together: Together
) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """At each width the logits (B, L, vocab), and what each layer returns for the first row, (1, L, D)."""
    outputs: dict[int, list[torch.Tensor]] = defaultdict(list)  # by thread: the widths may run at the same time

    def keep(_module, _args, output) -> None:
        state = (output[0] if isinstance(output, tuple) else output)[:1]
        outputs[threading.get_ident()].append(state.float())

    @torch.no_grad()  # which holds for one thread only
    def call(width: int | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        options = {} if width is None else {"width": width}
        logits = model(input_ids=input_ids, use_cache=False, **options).logits.float()
        return logits, outputs.pop(threading.get_ident(), [])

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        return together.run([partial(call, width) for width in widths])
    finally:
        for hook in hooks:
            hook.remove()


def _compare_states(first: torch.Tensor, second: torch.Tensor) -> float:
    """Channels that only the second has must hold zero, or count as a difference."""
    width = first.shape[-1]
    difference = torch.cat((second[..., :width] - first, second[..., width:]), dim=-1).abs().max().item()
    return difference / max(1.0, first.abs().max().item())


def _compare_logits(
    width: int | None, first: torch.Tensor, second: torch.Tensor, input_ids: torch.Tensor, states: list[float]
) -> Comparison:
    difference = (first - second).abs().max().item()
    before, after = (
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).item()
        for logits in (first, second)
    )
    same = torch.equal(first.argmax(-1), second.argmax(-1))
    return Comparison(width, difference, same, before, after, states)


def check(comparisons: list[Comparison], tolerance: float = TOLERANCE) -> dict[str, float]:
    """
    Metrics of a surgery that kept its function.

    Raises:
        SurgeryError: a difference beyond `tolerance` (nan included), or another argmax; the first layer at fault is
            named if layers were compared.
    """
    metrics: dict[str, float] = {}
    for result in comparisons:
        label = "full width" if result.width is None else f"width {result.width}"
        for layer, layer_difference in enumerate(result.layer_differences):
            if not layer_difference <= tolerance:
                raise SurgeryError(
                    f"surgery: {label}: states differ from layer {layer} on, by {layer_difference:.3g} > {tolerance:g}"
                )
        if not result.max_abs_logit_diff <= tolerance:
            raise SurgeryError(f"surgery: {label}: logits differ by {result.max_abs_logit_diff:.3g} > {tolerance:g}")
        if not result.argmax_identical:
            raise SurgeryError(f"surgery: {label}: another token became the most likely one")
        if result.width is not None:
            metrics[f"max_abs_logit_diff_width_{result.width}"] = result.max_abs_logit_diff
    metrics["max_abs_logit_diff"] = max(result.max_abs_logit_diff for result in comparisons)
    for layer, differences in enumerate(zip(*(result.layer_differences for result in comparisons), strict=True)):
        metrics[f"max_state_diff_layer_{layer}"] = max(differences)
    metrics["loss_before"] = comparisons[-1].loss_before
    metrics["loss_after"] = comparisons[-1].loss_after
    return metrics
