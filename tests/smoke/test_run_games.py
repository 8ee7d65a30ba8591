"""The real commands of recipes/games on a tiny random model: a team trains, resumes, plays; errors are one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from adamba.data import train_tokenizer
from adamba.errors import UserError
from adamba.loading import ModelArguments, load_checkpoint, load_model_and_tokenizer
from adamba.model import AdambaForCausalLM
from adamba.recipe_file import read_recipe
from adamba.tasks import TASKS
from adamba.tasks.roles import select_roles
from adamba.training.role_adapters import load_roles
from models import smallest_config
from run_games import ways_to_play
from tiny_runs import runner, write_recipe

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.smoke
SMALL = {
    "max_steps": 2,
    "num_prompts": 20,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "num_parallel_games": 2,
    "max_completion_length": 6,
    "max_turns": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return runner(monkeypatch)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([json.dumps(TASKS["plan_path"].example(seed, "train")) for seed in range(20)], 277)
    torch.manual_seed(0)
    AdambaForCausalLM(smallest_config(len(tokenizer), max_position_embeddings=512)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(name: str, checkpoint: Path, folder: Path, **changes) -> Path:
    values = read_recipe(ROOT / "recipes/games" / f"{name}.yaml") | SMALL | changes
    return write_recipe(
        folder / f"{name}.yaml", values | {"model_name_or_path": str(checkpoint), "output_dir": str(folder / "out")}
    )


def play(run: Callable[..., None], folder: Path, *given: object) -> dict:
    options = ["--num_episodes", "3", "--max_turns", "2", "--max_new_tokens", "6", *given]
    run("run_games.py", "--model_name_or_path", folder, *options)
    return json.loads((folder / "metrics.json").read_text())


def test_a_team_of_two_policies_trains_saves_the_best_resumes_and_is_played(run, checkpoint, tmp_path: Path) -> None:
    held_out = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "num_eval_prompts": 4,
        "per_device_eval_batch_size": 8,
        "load_best_model_at_end": False,
        "metric_for_best_model": "eval_reward",
        "save_total_limit": 2,
    }
    path = recipe("plan_path_4_per_role", checkpoint, tmp_path, lora_r=2, **held_out)
    run("run_grpo.py", path)
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["num_generated_tokens"] > 0 and metrics["train_steps"] == 2
    assert sorted(path.name for path in (out / "adapters").iterdir() if path.is_dir()) == ["actor", "planner"]
    log = json.loads((out / "log_history.json").read_text())
    assert any("eval_reward" in entry for entry in log)
    assert isinstance(load_roles(load_checkpoint(str(out)), out), PeftModel)

    metrics = play(run, out)
    assert metrics["game"] == "plan_path" and metrics["episodes_team"] == metrics["episodes_team_swapped"] == 3
    games = json.loads((out / "games.json").read_text())["transcripts"]
    assert {game["way"] for game in games} == {"team", "team_swapped"}
    assert any("@" in line and "G" in line for line in games[0]["lines"]), "no board is drawn"
    with pytest.raises(UserError, match=f"{out} is a team, with an adapter for each of actor, planner; run_games.py"):
        load_model_and_tokenizer(ModelArguments(model_name_or_path=str(out)))  # its base has learned nothing

    longer = recipe("plan_path_4_per_role", checkpoint, tmp_path, lora_r=2, **held_out)
    run("run_grpo.py", longer)  # the same run again: taken over from its last checkpoint
    assert json.loads((out / "metrics.json").read_text())["train_steps"] == 2


def test_one_shared_policy_and_the_untrained_ways(run, checkpoint, tmp_path: Path, capsys) -> None:
    run("run_grpo.py", recipe("sudoku_3_shared", checkpoint, tmp_path, max_steps=1))
    metrics = play(run, tmp_path / "out")
    assert metrics["game"] == "sudoku" and "success_rate_team" in metrics and "success_rate_single" not in metrics
    play(run, tmp_path / "out", "--task_settings", "{sudoku: {size: 9, min_blanks: 30, max_blanks: 30}}")
    games = json.loads((tmp_path / "out/games.json").read_text())["transcripts"]
    assert all(len(game["lines"][0]) == 89 and game["lines"][0].count("0") == 30 for game in games), "not those asked"
    with pytest.raises(SystemExit):
        play(run, tmp_path / "out", "--task_settings", "{sokoban: {size: 6}}")
    assert "out plays sudoku, not sokoban" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        play(run, tmp_path / "out", "--max_new_tokens", "600")
    assert "max_new_tokens: 600 is more than the model's 512 positions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"roles": {"boss": {}}}, "roles: unknown role 'boss'"),
        ({"roles": {"actor": {"tools": ["fly"]}}}, "roles: actor: no tool named 'fly'"),
        ({"rewards": {"glory": 1.0}}, "rewards: unknown reward 'glory'"),
        ({"policy": "none"}, "policy"),
        ({"eval_strategy": "steps"}, "eval_strategy"),
    ],
)
def test_bad_keys_stop_in_one_line(run, checkpoint, tmp_path: Path, capsys, changes: dict, message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("run_grpo.py", recipe("plan_path_3_shared", checkpoint, tmp_path, **changes))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and last.startswith("error: ") and message in last
    assert not (tmp_path / "out").exists()


def test_roles_that_a_recipe_leaves_to_the_task_are_played(tmp_path: Path) -> None:
    settings = {"plan_path": {"role_fraction": 0.5}}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"mix": {"plan_path": 1.0}, "task_settings": settings}))
    task, _, roles, ways = ways_to_play(tmp_path, has_adapters=False)
    assert list(ways) == ["single", "team"]
    assert [role.name for role in select_roles(roles, TASKS[task].environment)] == ["planner", "actor"]


def test_a_checkpoint_of_several_tasks_is_not_played(run, checkpoint, tmp_path: Path, capsys) -> None:
    mix = {"plan_path": 1.0, "sudoku": 1.0}
    (checkpoint / "recipe.yaml").write_text(f"mix: {json.dumps(mix)}\n")
    with pytest.raises(SystemExit):
        run("run_games.py", "--model_name_or_path", checkpoint)
    assert "needs exactly one task, has plan_path, sudoku" in capsys.readouterr().err
