"""
What a call of `generate` did, and rows that go through it in groups (`width="auto"`) but are one batch to the caller.
"""

from dataclasses import dataclass, field

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput


@dataclass
class GenerationTrace:
    """
    What the last `generate` did. `widths`: channels of each attention layer, per row if rows differ. `exit_layers`
    (B, new tokens): the last layer computed for each, -1 past the end of a row's group; `None` after beam search.
    `num_drafted`, `num_accepted`: tokens, in `verify`. `num_expanded`: tokens for which a row went wider.
    """

    widths: list
    num_layers: int
    exit_layers: torch.Tensor | None = None
    num_drafted: int = 0
    num_accepted: int = 0
    num_expanded: int = 0
    steps: list[torch.Tensor] = field(default_factory=list, repr=False)


Group = tuple[torch.Tensor, GenerateDecoderOnlyOutput | torch.Tensor, GenerationTrace]


def _in_order(groups: list[Group], parts: list[torch.Tensor], value: float) -> torch.Tensor:
    """One (rows, length, ...) tensor a group -> all rows in the batch's order, shorter ones ending in `value`."""
    places = []
    for (members, _, _), part in zip(groups, parts, strict=True):
        answers = len(part) // len(members)  # `num_return_sequences`
        places.append((members[:, None] * answers + torch.arange(answers, device=members.device)).flatten())
    by_row = [row for part in parts for row in part]
    ordered = [by_row[index] for index in torch.cat(places).argsort()]
    return torch.nn.utils.rnn.pad_sequence(ordered, batch_first=True, padding_value=value)


def merge_outputs(groups: list[Group], pad: int):
    """
    The groups' answers as one. Scores and logits of a row whose group ended earlier are 0 from there on; caches,
    attentions and hidden states have another shape in each group and are left out.
    """
    outputs = [output for _, output, _ in groups]
    if isinstance(outputs[0], torch.Tensor):
        return _in_order(groups, outputs, pad)
    merged = GenerateDecoderOnlyOutput(sequences=_in_order(groups, [output.sequences for output in outputs], pad))
    for key in ("scores", "logits"):
        if outputs[0].get(key) is not None:
            steps = _in_order(groups, [torch.stack(output[key], dim=1) for output in outputs], 0.0)
            merged[key] = tuple(steps.unbind(1))
    return merged


def merge_traces(groups: list[Group], widths: list) -> GenerationTrace:
    traces = [trace for _, _, trace in groups]
    merged = GenerationTrace(widths=widths, num_layers=traces[0].num_layers)
    exits = [trace.exit_layers for trace in traces if trace.exit_layers is not None]
    if len(exits) == len(groups):
        merged.exit_layers = _in_order(groups, exits, -1)
    for key in ("num_drafted", "num_accepted", "num_expanded"):
        setattr(merged, key, sum(getattr(trace, key) for trace in traces))
    return merged


def allowed_in_batch(allowed, members: torch.Tensor, answers: int, row: int, input_ids: torch.Tensor) -> list[int]:
    """A caller's `prefix_allowed_tokens_fn`, which counts the rows of the whole batch, asked for a group's row."""
    return allowed(int(members[row // answers]) * answers + row % answers, input_ids)
