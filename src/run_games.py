"""
Play a checkpoint of recipes/games on held-out instances, in the way it was trained: alone, as a team, with the roles
swapped. The figures go into its metrics.json, transcripts into its games.json; the report shows both.

    python src/run_games.py recipes/games/eval.yaml --model_name_or_path checkpoints/games/plan_path_1_sft
"""

from adamba.kept_help import print_kept_help

if __name__ == "__main__":
    print_kept_help()  # before the imports below, which take seconds

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel

from adamba.errors import UserError, user_errors
from adamba.loading import ModelArguments, check_length, load_model_and_tokenizer
from adamba.publish import read_run, update_metrics
from adamba.recipe import parse
from adamba.recipe_file import read_recipe
from adamba.report.measures import wilson_interval
from adamba.tasks import TASKS
from adamba.tasks.roles import DEFAULT_ROLES, select_roles
from adamba.tasks.task import refuse_unknown_settings
from adamba.training.agent_config import tool_call_limit
from adamba.training.evaluation import GameSettings, task_rows
from adamba.training.play import play
from adamba.training.role_adapters import load_roles
from adamba.training.session import logger, setup_logging
from adamba.training.team_play import Played, examples, of_episode, play_team, summary


@dataclass
class GamesArguments:
    num_episodes: int = field(default=200, metadata={"help": "Held-out instances, the same for every way of playing."})
    first_seed: int = field(default=0, metadata={"help": "Of these instances."})
    max_turns: int = field(default=12, metadata={"help": "Turns after which a team's game is over."})
    max_new_tokens: int = field(default=40, metadata={"help": "Tokens in one turn of an agent."})
    num_examples: int = field(default=2, metadata={"help": "Wins and losses kept as transcripts, each."})

    task_settings: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Harder games than it was trained on: task -> settings that differ."}
    )

    def __post_init__(self) -> None:
        for name in ("num_episodes", "max_turns", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} must be 1 or more")


@user_errors()
def main() -> None:
    model_args, args, recipe = parse(ModelArguments, GamesArguments)
    setup_logging()
    started = time.monotonic()
    folder = Path(model_args.model_name_or_path or "")
    model, tokenizer = load_model_and_tokenizer(model_args, base_alone=True)
    check_length(model, args.max_new_tokens, "max_new_tokens")
    model = load_roles(model, folder)
    task, settings, roles, ways = ways_to_play(folder, isinstance(model, PeftModel))
    for name in args.task_settings:
        if name != task:
            raise UserError(f"task_settings: {folder} plays {task}, not {name}")
    read_run(folder)  # where the figures go: its files are replaced
    refuse_unknown_settings(TASKS[task], args.task_settings.get(task, {}))
    games = GameSettings(settings={task: settings | args.task_settings.get(task, {})})
    rows = task_rows(task, args.num_episodes, games, first_seed=args.first_seed)

    metrics: dict[str, float | str] = {"game": task}
    transcripts = []
    for way, adapters in ways.items():
        if way == "single":
            episodes = play(
                model, tokenizer, rows, max_turns=tool_call_limit(rows) + 1, max_new_tokens=args.max_new_tokens
            )
            played: list[Played] = [of_episode(episode) for episode in episodes]
        else:
            played = play_team(
                model,
                tokenizer,
                rows,
                select_roles(roles, TASKS[task].environment),
                max_turns=args.max_turns,
                max_new_tokens=args.max_new_tokens,
                adapters=adapters,
            )
        figures = summary(played)
        low, high = wilson_interval(figures["success_rate"], figures["episodes"])
        figures |= {"success_low": low, "success_high": high}
        metrics |= {f"{key}_{way}": value for key, value in figures.items()}
        transcripts += [{"way": way, **example} for example in examples(played, args.num_examples)]
        logger.info(
            "%s, %s: %.1f %% [%.1f, %.1f]", task, way, *(100 * x for x in (figures["success_rate"], low, high))
        )
    metrics["eval_seconds"] = time.monotonic() - started
    (folder / "games.json").write_text(json.dumps({"task": task, "transcripts": transcripts}, indent=1) + "\n")
    update_metrics(folder, metrics, recipe.asked)


def ways_to_play(
    folder: Path, has_adapters: bool
) -> tuple[str, dict[str, Any], dict[str, Any] | Sequence[str], dict[str, dict[str, str] | None]]:
    """The task, its settings, the roles, and way → adapters, as the recipe in a checkpoint says it was trained.

    Raises:
        UserError: it was not trained on one task.
    """
    recipe = read_recipe(folder / "recipe.yaml")
    tasks = [name for name in recipe.get("mix", {}) if name in TASKS]
    if len(tasks) != 1:
        raise UserError(
            f"{folder / 'recipe.yaml'}: key 'mix': needs exactly one task, has {', '.join(tasks) or 'none'}"
        )
    settings = dict((recipe.get("task_settings") or {}).get(tasks[0], {}))
    shown_roles, fraction = settings.pop("roles", DEFAULT_ROLES), settings.pop("role_fraction", 0.0)
    roles = recipe.get("roles") or shown_roles
    ways: dict[str, dict[str, str] | None] = {"team": None}
    if not recipe.get("roles"):
        ways = {"single": None, "team": None} if fraction else {"single": None}
    if not has_adapters:
        return tasks[0], settings, roles, ways
    names = list(roles)
    return (
        tasks[0],
        settings,
        roles,
        {
            "team": dict(zip(names, names, strict=True)),
            "team_swapped": dict(zip(names, names[1:] + names[:1], strict=True)),
        },
    )


if __name__ == "__main__":
    main()
