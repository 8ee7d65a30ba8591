"""
Change a checkpoint's shape and keep its function: insert Mamba-2 layers, expand the width, sort by importance, slice.

    accelerate launch src/run_surgery.py recipes/tiny/phase0.yaml
    python src/run_surgery.py --operation slice --model_name_or_path checkpoints/tiny/phase2 --width 32 \
        --output_dir checkpoints/tiny/slice32 --mix pydoc_topics=1.0

Logits before and after are compared on real tokens, at every width; beyond 1e-4 nothing is saved.
"""

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from adamba.data import load_mixture, pack_rows
from adamba.data.arguments import DataArguments
from adamba.errors import UserError, one_line, user_errors
from adamba.hub import HubArguments, hub_target, push_run
from adamba.loading import ModelArguments, check_config_keys, load_model_and_tokenizer
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.publish import publish
from adamba.recipe import parse
from adamba.surgery import check, compare, expand_width, insert_mamba, slice_width, sort_by_importance
from adamba.training.session import logger, peak_memory_bytes, setup_logging

OPERATIONS = ("insert", "expand", "slice", "sort")


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

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise UserError(f"operation: {self.operation!r} is unknown; use {', '.join(OPERATIONS)}")
        for operation, key in (("expand", "hidden_size"), ("slice", "width")):
            if self.operation == operation and getattr(self, key) is None:
                raise UserError(f"{key}: missing; operation {operation} needs it")


def operate(model, args: SurgeryArguments, rows: torch.Tensor):
    """The model after the operation; `model` itself stays as it was."""
    if args.operation == "insert":
        check_config_keys("hybrid_config", AdambaConfig, args.hybrid_config)
        levels = {} if args.width_levels is None else {"width_levels": args.width_levels}
        return insert_mamba(model, every=args.mamba_every, seed=args.seed, **levels, **args.hybrid_config)
    if not isinstance(model, AdambaForCausalLM):
        raise UserError(f"operation: {args.operation} needs a hybrid, but this is a {type(model).__name__}")
    if args.operation == "expand":
        return expand_width(model, args.hidden_size, args.width_levels, seed=args.seed)
    if args.operation == "slice":
        return slice_width(model, args.width)
    changed = AdambaForCausalLM(model.config).to(model.dtype)
    changed.load_state_dict(model.state_dict())
    return sort_by_importance(changed.eval(), rows.split(8))


class AtWidth:
    """A model at one width, called as if it had no other: what a slice is compared with."""

    def __init__(self, model: AdambaForCausalLM, width):
        self.model, self.width = model, width

    def __call__(self, **inputs):
        return self.model(**inputs, width=self.width)


@user_errors()
def main() -> None:
    model_args, data_args, hub_args, args, recipe = parse(
        ModelArguments, DataArguments, HubArguments, SurgeryArguments
    )
    setup_logging()
    target = hub_target(hub_args, args.output_dir)
    started = time.monotonic()
    before, tokenizer = load_model_and_tokenizer(model_args)
    before.eval()
    packed = pack_rows(load_mixture(data_args.mix, **data_args.mixture_options("test")), tokenizer, args.max_length)
    check_rows = [row["input_ids"] for row in itertools.islice(packed, args.num_check_rows)]
    if not check_rows:
        raise UserError(f"mix: {', '.join(data_args.mix)} has no held-out row to compare logits on")
    rows = torch.tensor(check_rows)

    try:
        after = operate(before, args, rows)
        reference, widths = before, [None]
        if args.operation == "slice":
            reference = AtWidth(before, after.config.attention_widths)
        elif args.operation == "expand":
            widths = list(before.config.width_levels.values())
        logger.info("comparing logits on %d x %d tokens", *rows.shape)
        metrics = check(compare(reference, after, rows, widths))
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"{recipe.path or 'command line'}: {one_line(error)}") from error
    for key, value in metrics.items():
        logger.info("  %s: %.3g", key, value)
    metrics |= {
        "num_parameters": after.num_parameters(),
        "hidden_size": after.config.hidden_size,
        "surgery_seconds": time.monotonic() - started,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    publish(after, tokenizer, args.output_dir, recipe, metrics, {"model": str(model_args.model_name_or_path)})
    logger.info("wrote %s: %d parameters", Path(args.output_dir), after.num_parameters())
    if target is not None:
        logger.info("pushed to %s", push_run(args.output_dir, target))


if __name__ == "__main__":
    main()
