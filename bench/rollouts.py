"""
Where the time of a GRPO step goes: generation, environments, rewards, loss and optimizer, on the tool tasks; and how
many episodes a second go through whole steps, and through their rollouts alone, against TRL's stock loop (target:
1.5 x). Ours keeps caches between turns and trains only on rows that have an advantage: the same text where the
likeliest token is taken (`tests/training/test_conversations.py`), other draws of the same distribution where tokens
are sampled, as here.

    python bench/rollouts.py --checkpoint checkpoints/tiny/phase5            # 64 episodes a step, 4 rounds of 6 steps
    python bench/rollouts.py --checkpoint checkpoints/tiny/phase5 --quick    # 16, 1 of 2

The recipe is `recipes/tiny/phase6_grpo.yaml`, trained from the checkpoint for a few steps without saving anything;
parts are timed by the clock around TRL's own methods, the first step is not counted. `environments` is the tool loop
without its generation: running tools, parsing calls, rendering answers. A round trains by one loop, then by the other,
the next round the other way round and with another seed; a ratio is of all steps of a round. That both play alike
shows in `reward` and `tokens_per_episode`.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from runs import ROOT, write_results
from side_by_side import Spent, speedup
from transformers import TrainerCallback

from adamba.data.arguments import DataArguments
from adamba.loading import ModelArguments, load_model_and_tokenizer
from adamba.recipe import parse
from adamba.rewards import select_rewards
from adamba.tasks import ENVIRONMENTS
from adamba.training.agent_config import AgentConfig, tool_call_limit
from adamba.training.agent_rows import prompt_rows
from adamba.training.agent_trainer import AgentGRPOTrainer
from adamba.training.freezing import freeze_idle
from adamba.training.session import setup_logging

RECIPE = ROOT / "recipes" / "tiny" / "phase6_grpo.yaml"
# Name -> the trainer's method whose time it is; what runs inside another one is taken from it.
PARTS = {
    "rollout": "_generate",
    "generation": "_generate_single_turn",
    "rewards": "_calculate_rewards",
    "preparing": "_prepare_inputs",
    "step": "training_step",
}

LOOPS = ("ours", "stock")


class Parts(TrainerCallback):
    """What each of `PARTS` took in each step, and whole steps: seconds on the clock, and of CPU time."""

    def __init__(self, trainer: Any) -> None:
        self.steps: list[dict[str, Spent]] = []
        self.turns: list[int] = []
        self.rewards: list[float] = []
        self.tokens: list[float] = []
        self.spent: defaultdict[str, Spent] = defaultdict(lambda: (0.0, 0.0))
        for name, method in PARTS.items():
            setattr(trainer, method, self._timed(name, getattr(trainer, method)))
        trainer.add_callback(self)

    def _timed(self, name: str, method: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = now()
            try:
                return method(*args, **kwargs)
            finally:
                (clock, cpu), (more_clock, more_cpu) = self.spent[name], since(started)
                self.spent[name] = clock + more_clock, cpu + more_cpu
                self.num_turns += name == "generation"

        return timed

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.spent.clear()
        self.num_turns, self.started = 0, now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps.append({"whole": since(self.started), **self.spent})
        self.turns.append(self.num_turns)

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "reward" in logs:
            self.rewards.append(logs["reward"])
            self.tokens.append(logs["completions/mean_length"])


def now() -> Spent:
    return time.perf_counter(), time.process_time()


def since(started: Spent) -> Spent:
    clock, cpu = now()
    return clock - started[0], cpu - started[1]


def described(rounds: list[Parts], num_episodes: int) -> dict[str, float]:
    """What a step takes, and where: medians by the clock; what was played."""
    steps = [step for parts in rounds for step in parts.steps[1:]]
    clock = {name: statistics.median(step[name][0] for step in steps) for name in steps[0]}
    return {
        "episodes": num_episodes,
        "episodes_per_second": num_episodes / clock["whole"],
        "episodes_per_second_of_rollouts": num_episodes / clock["rollout"],
        "outside_generation": 1 - clock["generation"] / clock["rollout"],
        "step_seconds": clock["whole"],
        "generation": clock["generation"],
        "environments": clock["rollout"] - clock["generation"],
        "rewards": clock["rewards"],
        "rest_of_preparing": clock["preparing"] - clock["rollout"] - clock["rewards"],
        "loss_and_backward": clock["step"] - clock["preparing"],
        "optimizer_and_log": clock["whole"] - clock["step"],
        "turns": statistics.mean(turns for parts in rounds for turns in parts.turns[1:]),
        "reward": statistics.mean(reward for parts in rounds for reward in parts.rewards),
        "tokens_per_episode": statistics.mean(tokens for parts in rounds for tokens in parts.tokens),
    }


def total(parts: Parts, name: str) -> Spent:
    """What all steps but the first took of one part."""
    clock, cpu = zip(*(step[name] for step in parts.steps[1:]), strict=True)
    return sum(clock), sum(cpu)


def make_trainer(
    checkpoint: str, num_episodes: int, num_steps: int, folder: str, **overrides: Any
) -> AgentGRPOTrainer:
    """The trainer that `run_grpo.py` builds of the recipe, at another batch size."""
    given = {
        "model_name_or_path": checkpoint,
        "output_dir": folder,
        "max_steps": num_steps,
        "per_device_train_batch_size": num_episodes,
        "num_prompts": 8 * num_episodes,
        "save_strategy": "no",
        **overrides,
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    parsed = parse(ModelArguments, DataArguments, AgentConfig, argv=[str(RECIPE), *words], script="src/run_grpo.py")
    model_args, data_args, args, _ = parsed
    reward_functions, args.reward_weights = select_rewards(args.rewards)
    options = {"seed": data_args.mix_seed, "settings": data_args.task_settings}
    rows = prompt_rows(data_args.mix, args.num_prompts, split="train", **options)
    args.max_tool_calling_iterations = tool_call_limit(rows)
    model, tokenizer = load_model_and_tokenizer(model_args, training=True)
    freeze_idle(model)
    return AgentGRPOTrainer(
        model=model,
        args=args,
        reward_funcs=reward_functions,
        environment_factory={name: ENVIRONMENTS[name] for name in rows.unique("environment")},
        train_dataset=rows,
        processing_class=tokenizer,
    )


def train(loop: str, options: argparse.Namespace, seed: int) -> Parts:
    """What a few steps by one of `LOOPS` took."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options.checkpoint, options.episodes, options.steps + 1, folder, seed=seed)
        if loop == "stock":
            trainer._can_keep_caches = trainer._only_advantages_teach = lambda: False  # type: ignore[method-assign]
        elif not trainer._can_keep_caches():
            sys.exit(f"bench/rollouts.py: caches of {options.checkpoint} cannot be kept between turns")
        parts = Parts(trainer)
        trainer.train()
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 episodes a step, 1 round of 2 steps")
    parser.add_argument("--checkpoint", default="checkpoints/tiny/phase5")
    parser.add_argument("--episodes", type=int, default=64, help="of a step")
    parser.add_argument("--steps", type=int, default=6, help="of a round")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    if not (Path(options.checkpoint) / "config.json").is_file():
        sys.exit(f"bench/rollouts.py: {options.checkpoint} is no checkpoint; make one with `make demo`")
    if options.quick:
        options.episodes, options.steps, options.rounds = 16, 2, 1
    started = time.monotonic()
    setup_logging()
    played: dict[str, list[Parts]] = {loop: [] for loop in LOOPS}
    for seed in range(options.rounds):
        for loop in LOOPS if seed % 2 == 0 else reversed(LOOPS):
            played[loop].append(train(loop, options, seed))
    rows: list[dict[str, Any]] = [{"loop": loop, **described(played[loop], options.episodes)} for loop in LOOPS]
    for part in ("whole", "rollout"):
        seconds = {loop: [total(parts, part) for parts in played[loop]] for loop in LOOPS}
        rows.append({"measure": part, **speedup(seconds, "ours", "stock")})
    facts = {"steps": options.steps, "rounds": options.rounds, "quick": options.quick}
    write_results("rollouts", rows, started, target=1.5, **facts)


if __name__ == "__main__":
    main()
