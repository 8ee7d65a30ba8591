"""
One agent with GRPO against a team with AT-GRPO, at equal tokens that the model wrote, on plan_path and sudoku 4×4.

    python bench/games.py                                   # 3 seeds; goes on where it stopped
    python bench/games.py --seeds 1 --games plan_path --arms 2_grpo 3_shared

Everything starts from the one short SFT of the game (recipes/games/<game>_1_sft.yaml); the seed is that of the
reinforcement learning, its instances and its sampling. Target: the best team succeeds 20 points more often than the
one agent, and at least 95 % on one of the games.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from runs import ROOT, WORK, command, metrics_of, write_results

from adamba.recipe_file import read_recipe

GAMES = ("plan_path", "sudoku")
ARMS = ("3_shared", "2_grpo", "4_per_role")
KEYS = ("success_rate", "success_low", "success_high", "mean_turns", "invalid_action_rate", "tokens_per_episode")
WAYS = ("single", "team", "team_swapped")


def run(game: str, arm: str, checkpoint: Path, *arguments: object) -> dict[str, Any]:
    """Train and measure, unless that is done; the metrics."""
    if not (checkpoint / "metrics.json").is_file():
        script = "run_sft.py" if arm == "1_sft" else "run_grpo.py"
        recipe = f"recipes/games/{game}_{arm}.yaml"
        command(script, recipe, "--output_dir", checkpoint, "--disable_tqdm", "true", *arguments)
    if "eval_seconds" not in metrics_of(checkpoint):
        # The SFT has shown short games; all are measured on those of the reinforcement learning.
        settings = read_recipe(ROOT / "recipes" / "games" / f"{game}_2_grpo.yaml")["task_settings"]
        given = ("--model_name_or_path", checkpoint, "--task_settings", json.dumps(settings))
        command("run_games.py", "recipes/games/eval.yaml", *given)
    return metrics_of(checkpoint)


def rows_of(game: str, arm: str, seed: int, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each way of playing; success outside `generate` as the log of the run has it."""
    common = {"game": game, "arm": arm, "seed": seed, "generated_tokens": metrics.get("num_generated_tokens", 0)}
    return [
        common | {"way": way} | {key: metrics[f"{key}_{way}"] for key in KEYS}
        for way in WAYS
        if f"success_rate_{way}" in metrics
    ]


def outside_generate(checkpoint: Path) -> list[float]:
    """Share of each rollout's time that is not `generate`."""
    log = json.loads((checkpoint / "log_history.json").read_text(encoding="utf-8"))
    key = "games/rollout_outside_generate_fraction"
    return [entry[key] for entry in log if key in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--games", nargs="+", default=GAMES, choices=GAMES)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--work", type=Path, default=WORK / "games")
    options = parser.parse_args()
    started = time.monotonic()
    work = options.work if options.work.is_absolute() else ROOT / options.work
    rows: list[dict[str, Any]] = []
    outside: list[float] = []
    for game in options.games:
        rows += rows_of(game, "1_sft", 0, run(game, "1_sft", work / f"{game}_1_sft"))
    for seed in range(options.seeds):
        for game in options.games:
            for arm in options.arms:
                checkpoint = work / f"{game}_{arm}_{seed}"
                model = work / f"{game}_1_sft"
                keys = ("--model_name_or_path", model, "--seed", seed, "--mix_seed", seed + 1)
                rows += rows_of(game, arm, seed, run(game, arm, checkpoint, *keys))
                outside += outside_generate(checkpoint)
                facts: dict[str, Any] = {"targets": {"points_over_one_agent": 20, "success_rate": 0.95}}
                if outside:
                    facts["rollout_outside_generate_median"] = statistics.median(outside)
                    facts["rollout_outside_generate_highest"] = max(outside)
                write_results("games", rows, started, **facts)


if __name__ == "__main__":
    main()
