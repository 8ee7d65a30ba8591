"""
Change a checkpoint's shape and keep its function: insert Mamba-2 layers, expand the width, sort by importance, slice.

    accelerate launch src/run_surgery.py recipes/tiny/phase0.yaml
    python src/run_surgery.py --operation slice --model_name_or_path checkpoints/tiny/phase2 --width 32 \
        --output_dir checkpoints/tiny/slice32 --mix pydoc_topics=1.0

States after every layer and logits are compared on real tokens, at every width; beyond 1e-4 nothing is saved. A large
checkpoint goes from disk to disk, tensor by tensor (key `streaming`).
"""

import itertools
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from adamba.data import load_mixture, pack_rows
from adamba.data.arguments import DataArguments
from adamba.disk import check_output_dir
from adamba.errors import UserError, one_line, user_errors
from adamba.loading import ModelArguments, check_config_keys
from adamba.loading_streamed import load_or_open
from adamba.model import AdambaConfig, AdambaForCausalLM
from adamba.publish import publish
from adamba.recipe import parse
from adamba.surgery import check, compare, expansion, insertion, slicing, sort_by_importance
from adamba.surgery.rules import Surgery, apply, empty_model
from adamba.surgery.streaming import Weights, attach, num_weight_bytes, stream
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
    changed = AdambaForCausalLM(model.config).to(model.dtype)
    changed.load_state_dict(model.state_dict())
    return sort_by_importance(changed.eval(), rows.split(8))


class AtWidth:
    """A model at one width, called as if it had no other: what a slice is compared with."""

    def __init__(self, model: AdambaForCausalLM, width):
        self.model, self.width = model, width

    def __call__(self, **inputs):
        return self.model(**inputs, width=self.width)


def verify(before, after, surgery: Surgery | None, args: SurgeryArguments, rows: torch.Tensor) -> dict[str, float]:
    """Metrics of the comparison, logged; a difference beyond the tolerance raises `SurgeryError`."""
    reference, widths = before, [None]
    if args.operation == "slice":
        reference = AtWidth(before, after.config.attention_widths)
    elif args.operation == "expand":
        widths = list(before.config.width_levels.values())
    pairs = surgery.layers if surgery is not None else []
    layers = [(before.model.layers[old], after.model.layers[new]) for old, new in pairs]
    logger.info("comparing states and logits on %d x %d tokens", *rows.shape)
    metrics = check(compare(reference, after, rows, widths, layers))
    for key, value in metrics.items():
        if "_layer_" not in key:
            logger.info("  %s: %.3g", key, value)
    return metrics


@user_errors()
def main() -> None:
    model_args, data_args, args, recipe = parse(ModelArguments, DataArguments, SurgeryArguments)
    setup_logging()
    check_output_dir(args.output_dir)
    started = time.monotonic()
    before, tokenizer, weights = load_or_open(model_args, args.streaming)
    before.eval()
    rows = check_rows(data_args, tokenizer, args)
    metrics: dict[str, Any] = {}  # filled before they are published

    def finish(after) -> None:
        metrics.update(verify(before, after, surgery, args, rows))
        metrics.update(num_parameters=after.num_parameters(), hidden_size=after.config.hidden_size)
        metrics.update(surgery_seconds=time.monotonic() - started, peak_memory_bytes=peak_memory_bytes())

    def write(folder: Path) -> None:
        """Straight into the folder that is published once it is complete and verified; else nothing stays of it."""
        try:
            begun, cpu_begun = time.monotonic(), time.process_time()
            after = stream(surgery, before, weights, folder)
            metrics.update(write_seconds=time.monotonic() - begun, write_cpu_seconds=time.process_time() - cpu_begun)
            attach(before, weights.as_dtype(torch.float32))
            finish(attach(empty_model(after.config), Weights(folder, torch.float32)))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    try:
        surgery = None if args.operation == "sort" else plan(before, args)
        size = num_weight_bytes(
            before if surgery is None else empty_model(surgery.config), getattr(torch, model_args.dtype)
        )
        check_output_dir(args.output_dir, size)
        source: Any = write
        if weights is None:
            source = sort(before, rows) if surgery is None else apply(surgery, before)
            finish(source)
        publish(source, tokenizer, args.output_dir, recipe, metrics, {"model": str(model_args.model_name_or_path)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"output_dir: {args.output_dir}: {one_line(error)}; what was there is unchanged") from error
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"{recipe.path or 'command line'}: {one_line(error)}") from error
    logger.info("wrote %s: %d parameters", Path(args.output_dir), metrics["num_parameters"])


if __name__ == "__main__":
    main()
