"""Every surgery ends here: the same logits before and after, on real tokens, or nothing is saved."""

from dataclasses import dataclass

import torch

TOLERANCE = 1e-4  # largest absolute logit difference in fp32 (DESIGN, section 4)


class SurgeryError(ValueError):
    """The model after surgery does not compute what it computed before."""


@dataclass(frozen=True)
class Comparison:
    """One width: the largest logit difference, whether every argmax agrees, and the losses (nats per token)."""

    width: int | None
    max_abs_logit_diff: float
    argmax_identical: bool
    loss_before: float
    loss_after: float


@torch.no_grad()
def compare(before, after, input_ids: torch.Tensor, widths: list[int | None]) -> list[Comparison]:
    """`before` and `after` on `input_ids` (B, L), at each width; `None` calls both without a width (a dense base)."""
    comparisons = []
    for width in widths:
        options = {} if width is None else {"width": width}
        first = before(input_ids=input_ids, use_cache=False, **options).logits.float()
        second = after(input_ids=input_ids, use_cache=False, **options).logits.float()
        comparisons.append(_compare_logits(width, first, second, input_ids))
    return comparisons


def _compare_logits(width: int | None, first: torch.Tensor, second: torch.Tensor, input_ids: torch.Tensor):
    difference = (first - second).abs().max().item()
    losses = [
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).item()
        for logits in (first, second)
    ]
    same = torch.equal(first.argmax(-1), second.argmax(-1))
    return Comparison(width, difference, same, *losses)


def check(comparisons: list[Comparison], tolerance: float = TOLERANCE) -> dict[str, float]:
    """
    Metrics of a surgery that kept its function.

    Raises:
        SurgeryError: a difference beyond `tolerance` (nan included), or another argmax.
    """
    metrics: dict[str, float] = {}
    for result in comparisons:
        label = "full width" if result.width is None else f"width {result.width}"
        if not result.max_abs_logit_diff <= tolerance:
            raise SurgeryError(f"surgery: {label}: logits differ by {result.max_abs_logit_diff:.3g} > {tolerance:g}")
        if not result.argmax_identical:
            raise SurgeryError(f"surgery: {label}: another token became the most likely one")
        if result.width is not None:
            metrics[f"max_abs_logit_diff_width_{result.width}"] = result.max_abs_logit_diff
    metrics["max_abs_logit_diff"] = max(result.max_abs_logit_diff for result in comparisons)
    metrics["loss_before"] = comparisons[-1].loss_before
    metrics["loss_after"] = comparisons[-1].loss_after
    return metrics
