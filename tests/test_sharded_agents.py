"""DPO and GRPO in two processes (gloo) by the sharding files of `accelerate_configs/`: they train and publish."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import run_dpo  # noqa: F401  before the forks: each of them would import it anew
import run_grpo
from adamba.model import AdambaForCausalLM
from adamba.rewards import REWARDS
from adamba.training import at_grpo
from adamba.training.agent_trainer import AgentGRPOTrainer
from adamba.training.checkpoints import fault
from adamba.training.sharding import saved_by
from processes import assert_close, checkpoints, largest_difference, launch
from test_sharding import SAVED_BY
from tiny_runs import DPO, GRPO, save_agent, write_recipe

SAVING = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
TEAM = {  # one game at a time: the two speak by turns
    "mix": {"plan_path": 1.0},
    "roles": {"actor": {}, "planner": {}},
    "policy": "per_role",
    "num_parallel_games": 1,
    "lora_r": 4,
    "learning_rate": 0.01,
    "weight_decay": 0.1,
}
LORA = ("--use_peft", "true", "--lora_r", "4", "--learning_rate", "0.01")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dpo.yaml`, `grpo.yaml`, the model that they train, and what one process makes of the first, with LoRA too."""
    folder = tmp_path_factory.mktemp("agents")
    save_agent(folder / "model")
    for name, recipe in (("dpo", DPO), ("grpo", GRPO)):
        recipe = {key: value for key, value in recipe.items() if key != "per_device_train_batch_size"}
        write_recipe(folder / f"{name}.yaml", recipe | SAVING | {"model_name_or_path": str(folder / "model")})
    for name, options in (("one", ()), ("one_lora", LORA)):
        launch(1, folder, folder / "dpo.yaml", "--output_dir", folder / name, *options, script="run_dpo.py")
    return folder


@pytest.fixture(autouse=True)
def compiled_here(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))


@pytest.mark.parametrize("config", ["zero2", "zero3", "fsdp2"])
def test_sharded_dpo_is_dpo(folder: Path, config: str, tmp_path: Path) -> None:
    if config.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux")
    out = tmp_path / "out"
    launch(2, tmp_path, folder / "dpo.yaml", "--output_dir", out, config=config, script="run_dpo.py")
    assert largest_difference(folder / "one", out) <= 1e-5
    assert_close(folder / "one", out)
    assert_published(out, config, folder / "one")


@pytest.mark.parametrize("config", ["zero2", "zero3", "fsdp2"])
def test_adapters_are_merged_into_what_is_published(folder: Path, config: str, tmp_path: Path) -> None:
    if config.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux")
    out = tmp_path / "out"
    launch(2, tmp_path, folder / "dpo.yaml", "--output_dir", out, *LORA, config=config, script="run_dpo.py")
    assert largest_difference(folder / "one_lora", out) <= 1e-5
    assert_close(folder / "one_lora", out)
    with pytest.raises(AssertionError):
        assert_close(folder / "model", out)
    assert_published(out, config, folder / "one_lora")


def assert_published(out: Path, config: str, plain: Path) -> None:
    """What was saved under way is whole and sharded; what is published is what one process publishes."""
    for step in (2, 3):
        checkpoint = checkpoints(out) / f"checkpoint-{step}"
        assert fault(checkpoint) is None and saved_by(checkpoint) == SAVED_BY[config]
    assert {path.name for path in out.iterdir()} == {path.name for path in plain.iterdir()}
    _, report = AdambaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report


def uneven_rewards(rewards):
    """A random model's episodes all score alike; these do not."""

    def uneven(completions, **_) -> list[float]:
        return [float(len(json.dumps(completion)) % 7) for completion in completions]

    return [uneven], [1.0]


def test_grpo_under_zero2_is_grpo(folder: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux")
    monkeypatch.setattr(run_grpo, "select_rewards", uneven_rewards)
    for config in ("ddp_cpu", "zero2"):
        where = ("--output_dir", tmp_path / config)
        launch(2, tmp_path, folder / "grpo.yaml", *where, config=config, rows=8, script="run_grpo.py")
    assert largest_difference(tmp_path / "ddp_cpu", tmp_path / "zero2") <= 1e-5
    assert_close(tmp_path / "ddp_cpu", tmp_path / "zero2")
    with pytest.raises(AssertionError):
        assert_close(folder / "model", tmp_path / "zero2")
    assert_published(tmp_path / "zero2", "zero2", tmp_path / "ddp_cpu")


def test_processes_go_on_with_what_each_of_them_generated(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_grpo, "select_rewards", uneven_rewards)
    words = ("--save_steps", "1", "--steps_per_generation", "2", "--gradient_accumulation_steps", "1")
    options = {"config": "ddp_cpu", "rows": 8, "script": "run_grpo.py"}
    launch(2, tmp_path, folder / "grpo.yaml", "--output_dir", tmp_path / "whole", *words, **options)
    for step in (2, 3):
        shutil.rmtree(checkpoints(tmp_path / "whole") / f"checkpoint-{step}")
    words += ("--resume_from_checkpoint", str(checkpoints(tmp_path / "whole")))
    launch(2, tmp_path, folder / "grpo.yaml", "--output_dir", tmp_path / "resumed", *words, **options)
    assert_close(tmp_path / "whole", tmp_path / "resumed", tolerance=0.0)


def test_processes_keep_in_step_where_one_has_nothing_to_learn(folder: Path, tmp_path: Path, monkeypatch) -> None:
    def on_the_first_process(rewards):
        def uneven(completions, **_) -> list[float]:
            return [len(json.dumps(completion)) % 7 * float(os.environ["RANK"] == "0") for completion in completions]

        return [uneven], [1.0]

    monkeypatch.setattr(run_grpo, "select_rewards", on_the_first_process)
    for name in ("rows_with_an_advantage", "all_rows"):
        if name == "all_rows":
            monkeypatch.setattr(AgentGRPOTrainer, "_only_advantages_teach", lambda trainer: False)
        where = ("--output_dir", tmp_path / name)
        launch(2, tmp_path, folder / "grpo.yaml", *where, config="ddp_cpu", rows=8, script="run_grpo.py")
    assert_close(tmp_path / "rows_with_an_advantage", tmp_path / "all_rows")
    with pytest.raises(AssertionError):
        assert_close(folder / "model", tmp_path / "all_rows")


@pytest.mark.parametrize("config", ["ddp_cpu", "zero2"])
@pytest.mark.parametrize("rows", [8, 24], ids=["one role a process", "both"])
def test_roles_absent_from_a_step_stay_as_they_are(
    folder: Path, rows: int, config: str, tmp_path: Path, monkeypatch
) -> None:
    if config == "zero2":
        pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux")
    measures = run_grpo.measures

    def lora_weights(trainer):
        return [(name, value) for name, value in trainer.model.named_parameters() if "lora_" in name]

    def keep_weights(trainer, *args):
        weights = {name: torch.tensor(value.tolist()) for name, value in lora_weights(trainer)}
        torch.save(weights, tmp_path / f"rank{os.environ['RANK']}.pt")
        return measures(trainer, *args)

    def team(completions, **_) -> list[float]:
        """A random model's candidates all score alike; these do not."""
        return [float(len(json.dumps(completion)) % 7) for completion in completions]

    monkeypatch.setattr(run_grpo, "measures", keep_weights)
    monkeypatch.setattr(at_grpo, "team", team)
    recipe = GRPO | SAVING | TEAM | {"model_name_or_path": str(folder / "model"), "num_prompts": 32, "save_steps": 1}
    recipe = {key: value for key, value in recipe.items() if key not in ("per_device_train_batch_size", "rewards")}
    path = write_recipe(tmp_path / "team.yaml", recipe)
    launch(2, tmp_path, path, "--output_dir", tmp_path / "out", config=config, rows=rows, script="run_grpo.py")
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    if rows == 8 and config == "ddp_cpu":  # the actors spoke in steps 1 and 3, the planners in step 2
        saved = checkpoints(tmp_path / "out")
        for step, moved, kept in ((2, "planner", "actor"), (3, "actor", "planner")):
            for role in (moved, kept):
                files = [
                    saved / f"checkpoint-{number}/{role}/adapter_model.safetensors" for number in (step - 1, step)
                ]
                before, after = map(load_file, files)
                assert all(before[name].equal(after[name]) for name in before) == (role == kept), (step, role)


def test_a_process_with_rows_of_fewer_roles_keeps_nobody_waiting(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Each role is a pass of its own through DDP, which sent the buffers before each."""
    compute = at_grpo.AtGrpoTrainer._compute_loss

    def of_one_role(self, model, inputs):
        if self.args.process_index == 0:
            inputs = inputs | {"role_index": torch.zeros_like(inputs["role_index"])}
        return compute(self, model, inputs)

    monkeypatch.setattr(at_grpo.AtGrpoTrainer, "_compute_loss", of_one_role)
    recipe = GRPO | SAVING | TEAM | {"model_name_or_path": str(folder / "model"), "num_prompts": 32}
    recipe = {key: value for key, value in recipe.items() if key not in ("per_device_train_batch_size", "rewards")}
    path = write_recipe(tmp_path / "team.yaml", recipe | {"num_parallel_games": 2})
    launch(2, tmp_path, path, "--output_dir", tmp_path / "out", config="ddp_cpu", rows=24, script="run_grpo.py")


def test_each_held_out_game_is_played_once_and_all_processes_are_measured(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """Three prompts, twice each: of two batches of four rows the last two rows are there to fill it."""
    play_games = at_grpo.play_games

    def noting(rows, *args, **kwargs):
        rows = list(rows)
        if "num_groups" not in kwargs:
            with (tmp_path / f"seeds{os.environ['RANK']}").open("a") as file:
                file.writelines(f"{row['seed']}\n" for row in rows)
        groups, games = play_games(iter(rows), *args, **kwargs)
        for group in groups:  # all that the second process says could be used, nothing of the first's
            group.candidates[:] = [replace(one, local=float(os.environ["RANK"])) for one in group.candidates]
        return groups, games

    monkeypatch.setattr(at_grpo, "play_games", noting)
    held_out = {"num_eval_prompts": 3, "num_generations_eval": 2, "per_device_eval_batch_size": 2}
    recipe = GRPO | TEAM | held_out | {"model_name_or_path": str(folder / "model"), "policy": "shared"}
    recipe = recipe | {"max_steps": 1, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    recipe = {key: value for key, value in recipe.items() if key not in ("per_device_train_batch_size", "rewards")}
    path = write_recipe(tmp_path / "team.yaml", recipe)
    launch(2, tmp_path, path, "--output_dir", tmp_path / "out", config="ddp_cpu", rows=8, script="run_grpo.py")
    seeds = [(tmp_path / f"seeds{rank}").read_text().split() for rank in (0, 1)]
    assert [len(own) for own in seeds] == [4, 2]
    assert sorted(Counter(seeds[0] + seeds[1]).values()) == [2, 2, 2]
    log = json.loads((tmp_path / "out/log_history.json").read_text())
    assert {entry[rate] for entry in log for rate in entry if rate == "games/actor/invalid_action_rate"} == {0.5}


def test_each_held_out_row_counts_once(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """As above, of an agent alone."""

    def correctness(prompts, completions, seed, environment, log_metric, **columns) -> list[float]:
        with (tmp_path / "seeds").open("a") as file:
            file.writelines(f"{one}\n" for one in seed)
        log_metric(f"score_{environment[0]}", 0.5)
        return [one % 7 / 7 for one in seed]

    monkeypatch.setitem(REWARDS, "correctness", correctness)
    held_out = {"num_eval_prompts": 3, "num_generations_eval": 2, "eval_strategy": "steps", "eval_on_start": True}
    recipe = GRPO | held_out | {"mix": {"calculator": 1.0}, "rewards": {"correctness": 2.0}, "max_steps": 1}
    recipe = recipe | {"model_name_or_path": str(folder / "model"), "per_device_eval_batch_size": 2}
    del recipe["per_device_train_batch_size"]
    path = write_recipe(tmp_path / "alone.yaml", recipe | {"eval_steps": 5})
    launch(2, tmp_path, path, "--output_dir", tmp_path / "out", config="ddp_cpu", rows=8, script="run_grpo.py")
    read = [int(line) for line in (tmp_path / "seeds").read_text().split()][:8]  # before the first step
    mean = sum(seed % 7 / 7 for seed in set(read)) / 3
    assert sorted(Counter(read).values()) == [2, 2, 4] and mean != sum(seed % 7 / 7 for seed in read) / 8
    found, _ = [e for e in json.loads((tmp_path / "out/log_history.json").read_text()) if "eval_reward" in e]
    assert found["eval_reward"] == pytest.approx(2 * mean)
    assert found["eval_rewards/correctness/mean"] == found["eval_score_calculator"] == pytest.approx(mean)


@pytest.mark.parametrize(("config", "split"), [("zero3", "ZeRO-3"), ("fsdp2", "FSDP")])
def test_episodes_of_their_own_length_need_whole_weights(
    folder: Path, config: str, split: str, tmp_path: Path
) -> None:
    if config.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux")
    message = f"accelerate config: {split} splits the weights, .* use zero2.yaml, zero1.yaml or ddp.yaml"
    with pytest.raises(AssertionError, match=message):
        where = ("--output_dir", tmp_path / "out")
        launch(2, tmp_path, folder / "grpo.yaml", *where, config=config, rows=8, script="run_grpo.py")
    assert not (tmp_path / "out.trainer").exists(), "it is refused before anything is written"
