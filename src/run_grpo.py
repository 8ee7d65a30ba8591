"""
Phase 6, online: GRPO on the tasks' own environments, the model calling tools turn by turn. With `roles:` in the
recipe, AT-GRPO: a team plays, and candidates are compared inside their (instance, agent, turn) group.

    accelerate launch src/run_grpo.py recipes/tiny/phase6_grpo.yaml
    accelerate launch src/run_grpo.py recipes/tiny/phase6_grpo.yaml --mix calculator=1.0,tic_tac_toe=0.5 --max_steps 10
    accelerate launch src/run_grpo.py recipes/games/plan_path_3_shared.yaml
"""

from adamba.kept_help import print_kept_help

if __name__ == "__main__":
    print_kept_help()  # before the imports below, which take seconds

import os
from pathlib import Path

from adamba.data import log_mix
from adamba.data.arguments import DataArguments
from adamba.errors import user_errors
from adamba.loading import ModelArguments, check_length, check_reference, load_model_and_tokenizer
from adamba.recipe import parse
from adamba.rewards import select_rewards
from adamba.tasks import ENVIRONMENTS
from adamba.training.agent_config import AgentConfig, team_settings, tool_call_limit
from adamba.training.agent_rows import prompt_rows
from adamba.training.agent_trainer import AgentGRPOTrainer
from adamba.training.at_grpo import AtGrpoTrainer
from adamba.training.freezing import freeze_idle
from adamba.training.hard_prompts import unsolved_first
from adamba.training.lora import LoraArguments, merge_adapters, peft_config
from adamba.training.role_adapters import add_role_adapters
from adamba.training.session import finish, logger, measures, start, train


@user_errors()
def main() -> None:
    model_args, data_args, lora_args, args, recipe = parse(ModelArguments, DataArguments, LoraArguments, AgentConfig)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    inputs = {"model": model_args.model_name_or_path} if model_args.model_name_or_path else {}
    inputs |= data_args.files_read()
    output_dir = start(args, recipe, inputs)
    logger.info("mix: %s", log_mix(data_args.mix))

    reward_functions, args.reward_weights = select_rewards(args.rewards)
    options = {"seed": data_args.mix_seed, "settings": data_args.task_settings}
    rows = prompt_rows(data_args.mix, args.num_prompts, split="train", **options)
    held_out = prompt_rows(data_args.mix, args.num_eval_prompts, split="test", **options)
    environments = {name: ENVIRONMENTS[name] for name in rows.unique("environment")}
    team = team_settings(args, environments) if args.roles else None
    if team is None and args.max_tool_calling_iterations is None:
        args.max_tool_calling_iterations = tool_call_limit(rows)

    model, tokenizer = load_model_and_tokenizer(model_args, training=True)
    check_length(model, args.max_completion_length, "max_completion_length")
    if args.beta and not (lora_args.use_peft or args.policy == "per_role"):
        check_reference(model)
    freeze_idle(model)
    if args.unsolved_fraction is not None:
        model.to(args.device)
        options = {"max_new_tokens": args.max_completion_length}
        rows = unsolved_first(model, tokenizer, rows, args.unsolved_fraction, **options)
    common = {
        "args": args,
        "train_dataset": rows,
        "eval_dataset": held_out if args.num_eval_prompts else None,
        "processing_class": tokenizer,
        "max_generated_tokens": args.max_generated_tokens,
    }
    if team is None:
        trainer = AgentGRPOTrainer(
            model=model,
            reward_funcs=reward_functions,
            environment_factory=environments,
            peft_config=peft_config(lora_args, model),
            **common,
        )
    elif team.per_role:
        lora_args.use_peft = True
        model = add_role_adapters(model, peft_config(lora_args), [role.name for role in team.roles])
        trainer = AtGrpoTrainer(team_settings=team, model=model, **common)
    else:
        trainer = AtGrpoTrainer(team_settings=team, model=model, peft_config=peft_config(lora_args, model), **common)
    trained = train(trainer)
    if team is None or not team.per_role:
        merge_adapters(trainer)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    if rewards:
        trained |= {"reward_first": rewards[0], "reward_last": rewards[-1]}
    tokens_seen = int(trainer.state.num_input_tokens_seen)
    trained["num_generated_tokens"] = trainer.num_generated_tokens
    metrics = trained | measures(trainer, trained["train_seconds"], tokens_seen, args.max_completion_length or 0)
    finish(trainer, tokenizer, Path(output_dir), recipe, metrics, inputs)


if __name__ == "__main__":
    main()
