"""
Play a checkpoint on tasks and write what happened: trajectories with success labels, and pairs for DPO.

    python src/run_rollout.py --model_name_or_path checkpoints/tiny/phase5 --mix tic_tac_toe=1.0 --output_dir rollouts
    python src/run_dpo.py recipes/tiny/phase6_dpo.yaml --mix pairs=1.0 --data_files pairs=rollouts/pairs.jsonl \
        --imitated '[]'
"""

from adamba.kept_help import print_kept_help

if __name__ == "__main__":
    print_kept_help()  # before the imports below, which take seconds

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from adamba.data import log_mix
from adamba.data.arguments import DataArguments
from adamba.disk import check_output_dir
from adamba.errors import UserError, user_errors
from adamba.loading import ModelArguments, load_model_and_tokenizer
from adamba.output_folder import refuse_inputs
from adamba.recipe import parse
from adamba.training.play import play
from adamba.training.rollouts import preference_pairs, rollout_metrics, rollout_rows, trajectory
from adamba.training.session import logger, setup_logging


@dataclass
class RolloutArguments:
    output_dir: str = field(default="", metadata={"help": "Folder of trajectories.jsonl, pairs.jsonl, metrics.json."})
    num_prompts: int = field(default=256, metadata={"help": "Different task instances."})
    num_samples: int = field(default=4, metadata={"help": "Episodes played from each."})
    split: Literal["train", "test"] = field(default="train", metadata={"help": "Which instances."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; 0 takes the likeliest token."})
    max_turns: int | None = field(
        default=None, metadata={"help": "Most turns of the model in an episode; default: what the tasks may take."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens in one turn."})
    batch_size: int = field(default=256, metadata={"help": "Episodes in one generate call."})
    width: int | None = field(default=None, metadata={"help": "Play at this width; default: the full one."})
    exit_threshold: float | None = field(default=None, metadata={"help": "Exit early above this probability."})
    success_score: float = field(default=1.0, metadata={"help": "Score from which an episode is a success."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise UserError("output_dir: missing; name the folder for the trajectories")
        for name in ("num_prompts", "num_samples", "max_turns", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} must be at least 1")


@user_errors()
def main() -> None:
    model_args, data_args, args, recipe = parse(ModelArguments, DataArguments, RolloutArguments)
    check_output_dir(args.output_dir)
    refuse_inputs(args.output_dir, recipe.values)
    if (Path(args.output_dir) / "run.json").exists():
        raise UserError(f"output_dir: {args.output_dir} is a finished run, whose metrics.json would be lost")
    setup_logging()
    logger.info("mix: %s", log_mix(data_args.mix))
    rows = rollout_rows(
        data_args.mix,
        args.num_prompts,
        args.num_samples,
        split=args.split,
        seed=data_args.mix_seed,
        settings=data_args.task_settings,
    )
    model, tokenizer = load_model_and_tokenizer(model_args)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    modes = {"width": args.width, "exit_threshold": args.exit_threshold}
    episodes = play(
        model,
        tokenizer,
        rows,
        max_turns=args.max_turns,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        generate_kwargs={key: value for key, value in modes.items() if value is not None},
        temperature=args.temperature,
        seed=args.seed,
    )
    trajectories = [trajectory(episode, args.success_score) for episode in episodes]
    pairs = preference_pairs(trajectories)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "trajectories.jsonl", trajectories)
    write_lines(folder / "pairs.jsonl", pairs)
    metrics = rollout_metrics(trajectories, len(pairs))
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    for name, value in metrics.items():
        logger.info("%s: %g", name, value)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON Lines, written aside and renamed."""
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    aside.replace(path)


if __name__ == "__main__":
    main()
