"""Held-out games of a team: played to their end, every role measured; the best checkpoint is what is published."""

import json
import re
from pathlib import Path

import pytest
from datasets import concatenate_datasets
from safetensors.torch import load_file

from adamba.errors import UserError
from adamba.tasks import ENVIRONMENTS
from adamba.tasks.roles import select_roles
from adamba.training.agent_rows import own_columns, prompt_rows
from adamba.training.at_grpo import TeamSettings
from adamba.training.games import Game, prompt_ids
from adamba.training.lora import LoraArguments, peft_config
from adamba.training.role_adapters import add_role_adapters
from adamba.training.team_play import play_team
from teams import PATH, TEAM, path_rows, path_tokenizer, team_trainer, tiny_model

ROLES = select_roles(TEAM, ENVIRONMENTS["plan_path"])


@pytest.fixture(scope="module")
def tokenizer():
    return path_tokenizer()


def solver_says(prompt: str, role: str) -> str:
    """What the solver would do on the board of this prompt, as the role says it."""
    board = re.split("\n(?:Done|Refused|planner)", prompt.split("<|im_start|>user\n")[1].split("<|im_end|>")[0])[0]
    environment = ENVIRONMENTS["plan_path"]()
    environment.reset(grid=board.replace(" ", ""), moves_per_call=2)
    moves = environment._solver_argument()
    call = json.dumps({"name": "move", "arguments": {"moves": moves}})
    return moves if role == "planner" else f"<tool_call>\n{call}\n</tool_call>"


def model_of(tokenizer, per_role: bool):
    model = tiny_model(tokenizer)
    if not per_role:
        return model
    return add_role_adapters(model, peft_config(LoraArguments(use_peft=True, lora_r=4)), list(TEAM))


@pytest.mark.parametrize("per_role", [False, True])
def test_held_out_games_are_played_to_their_end_and_all_roles_measured(
    tokenizer,
    tmp_path: Path,
    per_role: bool,
) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "num_eval_prompts": 3, "num_generations_eval": 2}
    team = TeamSettings(ROLES, max_turns=6, per_role=per_role)
    trainer = team_trainer(
        tokenizer, tmp_path, team, model_of(tokenizer, per_role), per_device_eval_batch_size=4, **options
    )
    # Of the games still on the first one plays well: it is won in the end, and then the next one is the first.
    heard: list[str] = []

    def speak(prompts: list[list[int]], role: str) -> list[list[int]]:
        heard.extend([role] * len(prompts))
        first, *others = prompts
        said = [solver_says(tokenizer.decode(first), role), *("?" for _ in others)]
        return [tokenizer.encode(text + "<|im_end|>") for text in said]

    trainer._speak = speak
    metrics = trainer.evaluate()
    assert heard.count("planner") == heard.count("actor") > 6
    assert 0.0 < metrics["eval_games/success"] < 1.0
    assert 0.0 < metrics["eval_reward"] < 1.0
    for role in ("planner", "actor"):
        assert 0.0 < metrics[f"eval_games/{role}/invalid_action_rate"] < 1.0
    assert 1 < metrics["eval_games/num_turns"] <= 6 and "eval_loss" not in metrics
    again = trainer.evaluate()
    assert again["eval_reward"] == metrics["eval_reward"], "games of an earlier evaluation are counted"


def test_games_keep_to_the_models_context(tokenizer, tmp_path: Path) -> None:
    trainer = team_trainer(tokenizer, tmp_path, TeamSettings(ROLES), num_eval_prompts=2)
    trainer.model.config.max_position_embeddings = 30
    rows = [own_columns(row) for row in trainer.eval_dataset]
    plays = {
        "training": trainer.train,
        "its evaluation": trainer.evaluate,
        "run_games": lambda: play_team(trainer.model, tokenizer, rows, ROLES, max_turns=2, max_new_tokens=24),
    }
    for what, play in plays.items():
        with pytest.raises(UserError, match="more than 6 tokens leave no room") as error:
            play()
        assert "\n" not in str(error.value), what


def test_a_held_out_game_without_room_is_lost_and_the_others_are_played(tokenizer, tmp_path: Path) -> None:
    """A batch may hold no other game: which share one does not say whether the evaluation goes on."""
    trainer = team_trainer(tokenizer, tmp_path, TeamSettings(ROLES, max_turns=1), per_device_eval_batch_size=1)
    trainer.num_generations_eval = 1
    large = prompt_rows({"plan_path": 1.0}, 1, split="train", seed=0, settings={"plan_path": PATH | {"size": 8}})
    held_out = concatenate_datasets([large, path_rows(1)])
    start, _ = (len(prompt_ids(Game.start(own_columns(row), ROLES), tokenizer)) for row in held_out)
    trainer.model.config.max_position_embeddings = start - 1 + trainer.max_completion_length
    metrics = trainer.evaluate(held_out)
    assert metrics["eval_games/num_turns"] == 0.5 and metrics["eval_games/success"] == 0.0


def test_the_best_checkpoint_of_all_roles_is_what_is_published(
    tokenizer,
    tmp_path: Path,
    monkeypatch,
) -> None:
    team = TeamSettings(ROLES, per_role=True, num_parallel_games=2)
    each_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"num_eval_prompts": 2, "load_best_model_at_end": True, "metric_for_best_model": "eval_reward"}
    changes = {"per_device_train_batch_size": 16, "weight_decay": 0.1} | each_step | best
    trainer = team_trainer(tokenizer, tmp_path, team, model_of(tokenizer, True), **changes)
    monkeypatch.setattr(trainer, "evaluate", lambda *args, **kwargs: {"eval_reward": -trainer.state.global_step})
    trainer.train()
    assert trainer.state.best_global_step == 1
    trainer.save_model(str(tmp_path / "published"))
    for role in ("planner", "actor"):
        first, last, published = (
            load_file(tmp_path / folder / role / "adapter_model.safetensors")
            for folder in ("checkpoint-1", "checkpoint-2", "published/adapters")
        )
        assert any(not last[name].equal(value) for name, value in first.items())
        assert all(published[name].equal(value) for name, value in first.items()), role
