"""Supervised fine-tuning: TRL's SFTTrainer on a mixture that this package has rendered and packed."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from adamba.data import load_mixture, pack_rows
from adamba.data.arguments import DataArguments
from adamba.data.cuts import IGNORED_LABEL
from adamba.data.packing import tokenize_rows
from adamba.errors import UserError
from adamba.training.caps import SpendingCaps
from adamba.training.elastic import ElasticArguments, ElasticLossMixin
from adamba.training.hub_keys import HubKeys
from adamba.training.optimizers import OptimizerKeys, OptimizerMixin

# Keys that TRL's own preparation, collator and loss read, which nothing here runs, and what they are if left out.
UNREAD = {
    "completion_only_loss": None,
    "eval_packing": None,
    "loss_type": "nll",
    "padding_free": False,
    "truncation_mode": "keep_start",
}


@dataclass
class MixSFTConfig(SpendingCaps, HubKeys, OptimizerKeys, SFTConfig):
    """`SFTConfig` and the size of the evaluation. `packing` means this package's best fit.

    A conversation longer than `max_length` is cut, packed or not; the log says how many were.
    """

    num_eval_rows: int = field(
        default=32, metadata={"help": "Held-out rows of each source that the loss is taken on."}
    )
    own_order_per_rank: bool = field(
        default=True,
        metadata={
            "help": "With several processes, each draws the sources of its rows in an order of its own; false: all "
            "have the same source in the same row, so a batch is less of a mix."
        },
    )
    trust_remote_code: bool = field(default=False, init=False)  # ModelArguments has the key

    def __post_init__(self) -> None:
        for key, left_out in UNREAD.items():
            if (value := getattr(self, key)) != left_out:
                raise UserError(f"{key}: {value!r} would change nothing here; leave it out")
        super().__post_init__()
        if self.max_steps <= 0:
            raise UserError(f"max_steps: {self.max_steps} must be given, above 0; the data is a stream without end")
        if self.max_length is None:
            raise UserError("max_length: null is too long, give the tokens of a row")
        if self.packing and self.packing_strategy != "bfd":
            raise UserError(f"packing_strategy: {self.packing_strategy!r} is not supported, use 'bfd' (best fit)")
        if not self.packing and self.include_num_input_tokens_seen == "no":  # type: ignore[has-type]
            self.include_num_input_tokens_seen = (
                "non_padding"  # rows differ in length: the Trainer counts their tokens
            )


def token_rows(
    split: Literal["train", "test"],
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    args: MixSFTConfig,
    source: str | None = None,
) -> IterableDataset:
    """A stream of tokenized rows of the mix, or of one source of it, packed if the recipe says so."""
    ranks = {"rank": args.process_index, "num_ranks": args.world_size} if args.own_order_per_rank else {}
    mix = data_args.mix if source is None else {source: 1.0}
    rows = load_mixture(mix, **data_args.mixture_options(split, source, **ranks))
    options = {"assistant_only_loss": args.assistant_only_loss}
    if args.packing:
        options |= {"one_source_per_row": True, "cut_conversations": True, "seed": data_args.mix_seed}
        return pack_rows(rows, tokenizer, args.max_length, **options)
    return tokenize_rows(rows, tokenizer, args.max_length, **options)


def eval_datasets(
    data_args: DataArguments, tokenizer: PreTrainedTokenizerBase, args: MixSFTConfig
) -> dict[str, Dataset]:
    """The first held-out rows of each source, in memory."""
    datasets = {}
    for source in data_args.mix:
        stream = token_rows("test", data_args, tokenizer, args, source)
        rows = list(itertools.islice(stream, args.num_eval_rows))
        if not rows:
            raise UserError(f"mix: {source!r} has no held-out row to evaluate on (one in fifty is); give it more rows")
        datasets[source] = Dataset.from_list(rows)
    return datasets


class RowCollator:
    """Tokenized rows → a batch. Shorter rows are padded on the right; the source's name becomes its number."""

    def __init__(self, sources: Sequence[str], pad_id: int):
        self.number = {name: index for index, name in enumerate(sources)}
        self.pad_id = pad_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)

        def stack(values: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([row + [filler] * (longest - len(row)) for row in values])

        batch = {
            "input_ids": stack([row["input_ids"] for row in rows], self.pad_id),
            "labels": stack([row["labels"] for row in rows], IGNORED_LABEL),
            "source_id": torch.tensor([self.number[row["source"]] for row in rows]),
        }
        if "position_ids" in rows[0]:
            batch["position_ids"] = stack([row["position_ids"] for row in rows], 0)
        else:
            batch["attention_mask"] = stack([[1] * len(row["input_ids"]) for row in rows], 0)
        return batch


class MixSFTTrainer(ElasticLossMixin, OptimizerMixin, SFTTrainer):
    """SFTTrainer on rows that are tokenized already, with the loss of each source logged apart.

    Args:
        sources: names behind the rows' `source`.
        elastic_args: the elastic loss, if the recipe asks for it.
    """

    def __init__(
        self,
        *,
        args: MixSFTConfig,
        processing_class: PreTrainedTokenizerBase,
        sources: Sequence[str],
        elastic_args: ElasticArguments,
        **kwargs: Any,
    ):
        self.source_names = list(sources)
        self.elastic_args = elastic_args
        # Rendering, masks and packing are done; TRL must not do them again, nor drop the columns it does not know.
        args.packing = args.assistant_only_loss = args.shuffle_dataset = False
        args.remove_unused_columns = False
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        pad_id = processing_class.pad_token_id  # None with Llama's own tokenizers
        collator = RowCollator(sources, processing_class.eos_token_id if pad_id is None else pad_id)
        super().__init__(args=args, processing_class=processing_class, data_collator=collator, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        names = {f"eval_{source}_loss": f"eval_loss_{source}" for source in self.source_names}
        super().log({names.get(key, key): value for key, value in logs.items()}, *args, **kwargs)


def evaluate_sources(trainer: MixSFTTrainer, mix: Mapping[str, float]) -> dict[str, float]:
    """`eval_loss_<source>` of each evaluation dataset, and `eval_loss`, their mean by the weights of the mix."""
    losses = {}
    for source, dataset in trainer.eval_dataset.items():
        metrics = trainer.evaluate(dataset, metric_key_prefix=f"eval_{source}")
        losses[source] = metrics[f"eval_{source}_loss"]
    total = sum(mix[source] for source in losses)
    mean = sum(mix[source] * loss for source, loss in losses.items()) / total
    return {"eval_loss": mean, **{f"eval_loss_{source}": loss for source, loss in losses.items()}}
