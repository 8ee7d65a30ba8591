"""
Where the time of a GRPO step goes: generation, environments, rewards, loss and optimizer, on the tool tasks; and how
many episodes a second go through whole steps, and through their rollouts alone, against TRL's stock loop (target:
1.5 x). Ours keeps caches between turns and trains only on rows that have an advantage; the results are the same.

    python bench/rollouts.py --checkpoint checkpoints/tiny/phase5            # 64 episodes a step, 10 steps
    python bench/rollouts.py --checkpoint checkpoints/tiny/phase5 --quick    # 16, 2

The recipe is `recipes/tiny/phase6_grpo.yaml`, trained from the checkpoint for a few steps without saving anything;
parts are timed by the clock around TRL's own methods, the first step is not counted. `environments` is the tool loop
without its generation: running tools, parsing calls, rendering answers.
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
    """Seconds in each of `PARTS` in each step, and of whole steps."""

    def __init__(self, trainer: Any) -> None:
        self.steps: list[dict[str, float]] = []
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.turns = 0
        self.started = time.perf_counter()
        for name, method in PARTS.items():
            setattr(trainer, method, self._timed(name, getattr(trainer, method)))
        trainer.add_callback(self)

    def _timed(self, name: str, method: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.spent[name] += time.perf_counter() - started
                self.turns += name == "generation"

        return timed

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.spent.clear()
        self.turns, self.started = 0, time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        whole, spent = time.perf_counter() - self.started, self.spent
        learning = spent["step"] - spent["preparing"]
        self.steps.append(
            {
                "step_seconds": whole,
                "generation": spent["generation"],
                "environments": spent["rollout"] - spent["generation"],
                "rewards": spent["rewards"],
                "rest_of_preparing": spent["preparing"] - spent["rollout"] - spent["rewards"],
                "loss_and_backward": learning,
                "optimizer_and_log": whole - spent["step"],
                "turns": float(self.turns),
            }
        )


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 episodes a step, 2 steps")
    parser.add_argument("--checkpoint", default="checkpoints/tiny/phase5")
    parser.add_argument("--episodes", type=int, default=64, help="of a step")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    if not (Path(options.checkpoint) / "config.json").is_file():
        sys.exit(f"bench/rollouts.py: {options.checkpoint} is no checkpoint; make one with `make demo`")
    if options.quick:
        options.episodes, options.steps = 16, 2
    started = time.monotonic()
    setup_logging()
    rows = []
    for loop in LOOPS:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(options.checkpoint, options.episodes, options.steps + 1, folder)
            if loop == "stock":
                trainer._can_keep_caches = trainer._only_advantages_teach = lambda: False  # type: ignore[method-assign]
            elif not trainer._can_keep_caches():
                sys.exit(f"bench/rollouts.py: caches of {options.checkpoint} cannot be kept between turns")
            parts = Parts(trainer)
            trainer.train()
        steps = parts.steps[1:]
        row = {key: statistics.median(step[key] for step in steps) for key in steps[0]}
        rollout = row["generation"] + row["environments"]
        rates = {
            "episodes_per_second": options.episodes / row["step_seconds"],
            "episodes_per_second_of_rollouts": options.episodes / rollout,
            "outside_generation": row["environments"] / rollout,
        }
        rows.append({"loop": loop, "episodes": options.episodes} | rates | row)
    facts: dict[str, Any] = {
        f"speedup{of}": rows[0][f"episodes_per_second{of}"] / rows[1][f"episodes_per_second{of}"]
        for of in ("", "_of_rollouts")
    }
    write_results("rollouts", rows, started, steps=options.steps, quick=options.quick, target=1.5, **facts)


if __name__ == "__main__":
    main()
