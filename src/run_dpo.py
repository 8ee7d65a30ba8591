"""
Phase 6, offline: DPO on pairs of turns: the solver's against a wrong one, trajectories of a file, or a card's pairs.

    accelerate launch src/run_dpo.py recipes/tiny/phase6_dpo.yaml
    accelerate launch src/run_dpo.py recipes/tiny/phase6_dpo.yaml --mix pairs=1.0 --data_files pairs=pairs.jsonl \
        --imitated '[]'
"""

from adamba.kept_help import print_kept_help

if __name__ == "__main__":
    print_kept_help()  # before the imports below, which take seconds

from dataclasses import dataclass, field
from pathlib import Path

from trl import DPOConfig, DPOTrainer

from adamba.data import log_mix
from adamba.data.arguments import DataArguments
from adamba.errors import UserError, user_errors
from adamba.loading import ModelArguments, check_length, check_reference, load_model_and_tokenizer
from adamba.recipe import parse
from adamba.training.agent_rows import preference_rows
from adamba.training.caps import SpendingCaps
from adamba.training.freezing import freeze_idle
from adamba.training.hub_keys import HubKeys
from adamba.training.lora import LoraArguments, merge_adapters, peft_config
from adamba.training.optimizers import OptimizerKeys, OptimizerMixin
from adamba.training.preference_lengths import check_lengths
from adamba.training.session import finish, logger, measures, start, train


@dataclass
class PreferenceConfig(SpendingCaps, HubKeys, OptimizerKeys, DPOConfig):
    """`DPOConfig` and how many pairs there are."""

    trust_remote_code: bool = field(default=False, init=False)  # the key is ModelArguments'
    num_pairs: int = field(default=4096, metadata={"help": "Pairs to learn from."})
    distinct_pairs: bool = field(
        default=False,
        metadata={"help": "Keep each of them once, so that common turns do not crowd out the rare ones."},
    )
    imitated: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Sources of the mix that must not be forgotten: their worse turns are left out and the better "
            "ones only imitated, by the sft term of loss_type. rewards/accuracies counts them as not preferred."
        },
    )
    num_eval_pairs: int = field(default=0, metadata={"help": "Held-out pairs for `eval_strategy`."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_pairs < 1:
            raise UserError(f"num_pairs: {self.num_pairs} must be 1 or more")
        if self.eval_strategy != "no" and self.num_eval_pairs < 1:
            raise UserError(f"eval_strategy: {self.eval_strategy} needs num_eval_pairs above 0")
        if self.imitated and "sft" not in self.loss_type:
            raise UserError(
                f"imitated: {self.imitated} teaches nothing with loss_type {self.loss_type}; "
                "add sft, for instance loss_type: [sigmoid, sft]"
            )


class PreferenceTrainer(OptimizerMixin, DPOTrainer):
    """`DPOTrainer` with the recipe's optimizer."""


@user_errors()
def main() -> None:
    model_args, data_args, lora_args, args, recipe = parse(
        ModelArguments, DataArguments, LoraArguments, PreferenceConfig
    )
    inputs = {"model": model_args.model_name_or_path} if model_args.model_name_or_path else {}
    inputs |= data_args.files_read()
    output_dir = start(args, recipe, inputs)
    logger.info("mix: %s", log_mix(data_args.mix))

    options = {
        "settings": data_args.task_settings,
        "data_files": data_args.data_files,
        "cards_dir": data_args.cards_dir,
        "on_bad_file": data_args.on_bad_file,
        "seed": data_args.mix_seed,
    }
    rows = preference_rows(
        data_args.mix, args.num_pairs, split="train", distinct=args.distinct_pairs, imitated=args.imitated, **options
    )
    logger.info("%d pairs", len(rows))
    held_out = None
    if args.num_eval_pairs and args.eval_strategy != "no":
        held_out = preference_rows(data_args.mix, args.num_eval_pairs, split="test", **options)

    model, tokenizer = load_model_and_tokenizer(model_args, training=True)
    check_length(model, args.max_length)
    if not (lora_args.use_peft or args.precompute_ref_log_probs):
        check_reference(model)
    freeze_idle(model)
    trainer = PreferenceTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=peft_config(lora_args, model),
    )
    check_lengths(trainer.train_dataset, len(rows), args)
    trained = train(trainer)
    merge_adapters(trainer)
    accuracies = [entry["rewards/accuracies"] for entry in trainer.state.log_history if "rewards/accuracies" in entry]
    if accuracies:
        trained |= {"preference_accuracy_first": accuracies[0], "preference_accuracy_last": accuracies[-1]}
    tokens_seen = int(max((entry.get("num_tokens", 0) for entry in trainer.state.log_history), default=0))
    metrics = trained | measures(trainer, trained["train_seconds"], tokens_seen, args.max_length or 0)
    finish(trainer, tokenizer, Path(output_dir), recipe, metrics, inputs)


if __name__ == "__main__":
    main()
