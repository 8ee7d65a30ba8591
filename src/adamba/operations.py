"""What `run_surgery.py` can do to a model: its keys, the surgery that they ask for, and the comparison at its end."""

import copy
import itertools
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from adamba.data import load_mixture, pack_rows
from adamba.data.arguments import DataArguments
from adamba.errors import UserError
from adamba.loading import check_config_keys
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.surgery import check, compare, expansion, insertion, slicing, sort_by_importance
from adamba.surgery.fetching import Together
from adamba.surgery.rules import Surgery

logger = logging.getLogger("adamba")

OPERATIONS = ("insert", "expand", "slice", "sort")
BYTES_AT_ONCE = 2**30  # logits and states of several widths


@dataclass
class SurgeryArguments:
    operation: str = field(metadata={"help": f"One of {', '.join(OPERATIONS)}."})
    output_dir: str = field(metadata={"help": "Folder of the new checkpoint."})
    hidden_size: int | None = field(default=None, metadata={"help": "expand: the new width of the residual stream."})
    width_levels: dict[str, int] | None = field(
        default=None, metadata={"help": "insert, expand: level name -> channels, the last one being the hidden size."}
    )
    width: int | str | list[int] | None = field(
        default=None, metadata={"help": "slice: a level name, a number of channels, or one for each attention layer."}
    )
    mamba_every: int = field(default=1, metadata={"help": "insert: one Mamba-2 layer after this many layers."})
    hybrid_config: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "insert: fields of AdambaConfig, for instance mamba_state_size."}
    )
    seed: int = field(default=0, metadata={"help": "Of the new random weights."})
    max_length: int = field(default=256, metadata={"help": "Tokens in a row of the check."})
    num_check_rows: int = field(default=16, metadata={"help": "Rows on which the logits are compared."})
    streaming: bool | None = field(
        default=None,
        metadata={
            "help": "From disk to disk, tensor by tensor, with the same result; by itself when ten times the old "
            "checkpoint is more than the free memory."
        },
    )

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise UserError(f"operation: {self.operation!r} is unknown; use {', '.join(OPERATIONS)}")
        for operation, key in (("expand", "hidden_size"), ("slice", "width")):
            if self.operation == operation and getattr(self, key) is None:
                raise UserError(f"{key}: missing; operation {operation} needs it")
        if self.operation == "sort":
            if self.streaming:
                raise UserError("streaming: true, but operation sort runs the whole model in memory; leave it out")
            self.streaming = False


def check_rows(data_args: DataArguments, tokenizer, args: SurgeryArguments) -> torch.Tensor:
    """Held-out token ids (rows, max_length) on which logits are compared."""
    packed = pack_rows(load_mixture(data_args.mix, **data_args.mixture_options("test")), tokenizer, args.max_length)
    rows = [row["input_ids"] for row in itertools.islice(packed, args.num_check_rows)]
    if not rows:
        raise UserError(f"mix: {', '.join(data_args.mix)} has no held-out row to compare logits on")
    return torch.tensor(rows)


def plan(before: PreTrainedModel, args: SurgeryArguments) -> Surgery:
    """What is done to each tensor; `before` may have no weights."""
    if args.operation == "insert":
        check_config_keys("hybrid_config", AdambaConfig, args.hybrid_config)
        levels = {} if args.width_levels is None else {"width_levels": args.width_levels}
        options = {**levels, **args.hybrid_config}
        return insertion(before.config, before.state_dict(), every=args.mamba_every, seed=args.seed, **options)
    if not isinstance(before, AdambaForCausalLM):
        raise UserError(f"operation: {args.operation} needs a hybrid, but this is a {type(before).__name__}")
    if args.operation == "expand":
        return expansion(before.config, args.hidden_size, args.width_levels, seed=args.seed)
    return slicing(before.config, args.width)


def sort(model: PreTrainedModel, rows: torch.Tensor) -> AdambaForCausalLM:
    """A sorted copy."""
    if not isinstance(model, AdambaForCausalLM):
        raise UserError(f"operation: sort needs a hybrid, but this is a {type(model).__name__}")
    return sort_by_importance(copy.deepcopy(model), rows.split(8))


class AtWidth:
    """A model at one width, called as if it had no other: what a slice is compared with."""

    def __init__(self, model: AdambaForCausalLM, width):
        self.model, self.width = model, width

    def __call__(self, **inputs):
        return self.model(**inputs, width=self.width)


def compared_widths(before: PreTrainedModel, args: SurgeryArguments) -> list[int | None]:
    """Where `verify` compares: every level of a model that is made wider; `None` is the whole of it."""
    return list(before.config.width_levels.values()) if args.operation == "expand" else [None]


def at_once(before: PreTrainedModel, config: AdambaConfig, args: SurgeryArguments, rows: torch.Tensor) -> Together:
    """All widths compared in one pass over the weights, if what they hold meanwhile is small; else one by one."""
    num_widths = len(compared_widths(before, args))
    logits = 2 * rows.numel() * config.vocab_size
    states = 2 * rows.shape[1] * config.hidden_size * config.num_hidden_layers
    return Together(num_widths if num_widths * 4 * (logits + states) <= BYTES_AT_ONCE else 1)


def in_fp32(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or a copy if it is in halves."""
    return copy.deepcopy(model).float() if model.dtype in (torch.float16, torch.bfloat16) else model


def verify(
    before,
    after,
    surgery: Surgery | None,
    args: SurgeryArguments,
    rows: torch.Tensor,
    together: Together | None = None,
) -> dict[str, float]:
    """
    Metrics of the comparison, logged; a difference beyond the tolerance raises `SurgeryError`. Halves are compared in
    fp32: another order of channels or another block of a matrix product rounds them otherwise.

    Args:
        together: with which `attach` was called, for models without weights.
    """
    before, after = (in_fp32(model) for model in (before, after))
    reference: Any = before
    if args.operation == "slice":
        reference = AtWidth(before, after.config.attention_widths)
    pairs = surgery.layers if surgery is not None else []
    layers = [(before.model.layers[old], after.model.layers[new]) for old, new in pairs]
    logger.info("comparing states and logits on %d x %d tokens", *rows.shape)
    metrics = check(compare(reference, after, rows, compared_widths(before, args), layers, together))
    for key, value in metrics.items():
        if "_layer_" not in key:
            logger.info("  %s: %.3g", key, value)
    return metrics
