"""Pretraining and phases 1 to 4: a Trainer over packed rows, with the elastic loss."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.surgery import sort_by_importance
from adamba.training.caps import SpendingCaps
from adamba.training.elastic import ElasticArguments, ElasticLossMixin
from adamba.training.hub_keys import HubKeys
from adamba.training.optimizers import OptimizerKeys, OptimizerMixin


@dataclass
class PretrainConfig(SpendingCaps, HubKeys, OptimizerKeys, TrainingArguments):
    """`TrainingArguments`, caps, the Hub, and what the phases add."""

    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs every column."})
    max_length: int = field(default=2048, metadata={"help": "Tokens in a packed row."})
    train_only: str = field(
        default="all", metadata={"help": "all, mamba, gates or mamba_and_gates; the rest is frozen."}
    )
    sort_by_importance: bool = field(
        default=False, metadata={"help": "Before training, put important channels, heads and units first."}
    )
    num_calibration_rows: int = field(default=32, metadata={"help": "Rows that importance is measured on."})
    old_weight_lr_scale: float = field(
        default=1.0, metadata={"help": "After an expansion: learning rate of old weights relative to new ones."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps <= 0:
            raise UserError(f"max_steps: {self.max_steps} must be given, above 0; the data is a stream without end")
        if self.eval_strategy != "no":
            raise UserError(
                f"eval_strategy: {self.eval_strategy} has no held-out rows here; run_eval.py takes the loss"
            )
        if self.sort_by_importance and is_deepspeed_zero3_enabled():
            raise UserError(
                "sort_by_importance: true needs whole weights on each rank; not with ZeRO-3 (use zero2.yaml)"
            )
        if not 0 <= self.old_weight_lr_scale <= 1:
            raise UserError(f"old_weight_lr_scale: {self.old_weight_lr_scale} must be from 0 to 1")


def sort_where_it_trains(model: AdambaForCausalLM, rows: torch.Tensor, device: torch.device) -> None:
    """
    `sort_by_importance` on the device of this process, since a launcher leaves each process one CPU core: hours for a
    large model. By the first process's order, because GPUs may choose kernels that round differently.
    """
    sort_by_importance(model.to(device), rows.split(8), agree=lambda order: broadcast_object_list([order])[0])


class PackedCollator:
    """Rows of one length -> a batch; the source's name becomes its number in `sources`."""

    def __init__(self, sources: Sequence[str]):
        self.number = {name: index for index, name in enumerate(sources)}

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels", "position_ids")}
        batch["source_id"] = torch.tensor([self.number[row["source"]] for row in rows])
        return batch


class PretrainTrainer(ElasticLossMixin, OptimizerMixin, Trainer):
    """`Trainer` on packed rows. `sources` are the names behind `source_id`."""

    def __init__(self, *args, sources: Sequence[str], elastic_args: ElasticArguments, **kwargs):
        self.source_names = list(sources)
        self.elastic_args = elastic_args
        super().__init__(*args, data_collator=PackedCollator(sources), **kwargs)
