"""Every surgery ends here: the same states and logits before and after, on real tokens, or nothing is saved."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

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
) -> list[Comparison]:
    """
    `before` and `after` on `input_ids` (B, L), at each width; `None` calls both without a width (a dense base).

    Args:
        layers: pairs of layers, (of before, of after), whose outputs are compared too, on the first row.
    """
    comparisons = []
    for width in widths:
        options = {} if width is None else {"width": width}
        with _outputs([layer for layer, _ in layers]) as first_states:
            first = before(input_ids=input_ids, use_cache=False, **options).logits.float()
        with _outputs([layer for _, layer in layers]) as second_states:
            second = after(input_ids=input_ids, use_cache=False, **options).logits.float()
        states = list(map(_compare_states, first_states, second_states))
        comparisons.append(_compare_logits(width, first, second, input_ids, states))
    return comparisons


@contextmanager
def _outputs(layers: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """What each layer returns for the first row, (1, L, D)."""
    outputs: list[torch.Tensor] = []

    def keep(_module, _args, output) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output)[:1].float())

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield outputs
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
