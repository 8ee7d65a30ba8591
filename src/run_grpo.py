"""
Phase 6, online: GRPO on the tasks' own environments, the model calling tools turn by turn.

    accelerate launch src/run_grpo.py recipes/tiny/phase6_grpo.yaml
    accelerate launch src/run_grpo.py recipes/tiny/phase6_grpo.yaml --mix calculator=1.0,tic_tac_toe=0.5 --max_steps 10
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from trl import GRPOConfig, GRPOTrainer

from adamba.data import log_mix
from adamba.data.arguments import DataArguments
from adamba.errors import UserError, user_errors
from adamba.loading import ModelArguments, load_model_and_tokenizer
from adamba.recipe import parse
from adamba.rewards import REWARDS, select_rewards
from adamba.tasks import ENVIRONMENTS
from adamba.training.agent_rows import prompt_rows
from adamba.training.caps import SpendingCaps
from adamba.training.hub_keys import HubKeys
from adamba.training.lora import LoraArguments, merge_adapters, peft_config
from adamba.training.session import finish, logger, measures, start, train

MAX_TOOL_CALLS = 8  # TRL's loop does not end with the environment; the longest game has 5 moves


@dataclass
class AgentConfig(SpendingCaps, HubKeys, GRPOConfig):
    """`GRPOConfig` and what playing the tasks adds."""

    trust_remote_code: bool = field(default=False, init=False)  # the key is ModelArguments'
    rewards: dict[str, float] = field(
        default_factory=lambda: {"correctness": 1.0, "format": 0.2},
        metadata={"help": f"Reward -> weight: {', '.join(REWARDS)}."},
    )
    num_prompts: int = field(default=2048, metadata={"help": "Different instances to play."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_prompts < 1:
            raise UserError(f"num_prompts: {self.num_prompts} must be 1 or more")


@user_errors()
def main() -> None:
    model_args, data_args, lora_args, args, recipe = parse(ModelArguments, DataArguments, LoraArguments, AgentConfig)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    inputs = {"model": model_args.model_name_or_path} if model_args.model_name_or_path else {}
    output_dir = start(args, recipe, inputs)
    logger.info("mix: %s", log_mix(data_args.mix))

    reward_functions, args.reward_weights = select_rewards(args.rewards)
    if args.max_tool_calling_iterations is None:
        args.max_tool_calling_iterations = MAX_TOOL_CALLS
    rows = prompt_rows(
        data_args.mix,
        args.num_prompts,
        split="train",
        seed=data_args.mix_seed,
        settings=data_args.task_settings,
    )
    environments = {name: ENVIRONMENTS[name] for name in rows.unique("environment")}

    model, tokenizer = load_model_and_tokenizer(model_args, training=True)
    trainer = GRPOTrainer(
        model=model,
        args=args,
        reward_funcs=reward_functions,
        train_dataset=rows,
        processing_class=tokenizer,
        environment_factory=environments,
        peft_config=peft_config(lora_args),
    )
    trained = train(trainer)
    merge_adapters(trainer)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    if rewards:
        trained |= {"reward_first": rewards[0], "reward_last": rewards[-1]}
    tokens_seen = int(trainer.state.num_input_tokens_seen)
    metrics = trained | measures(trainer, trained["train_seconds"], tokens_seen, args.max_completion_length or 0)
    finish(trainer, tokenizer, Path(output_dir), recipe, metrics, inputs)


if __name__ == "__main__":
    main()
