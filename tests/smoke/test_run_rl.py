"""The real GRPO and DPO commands on a tiny random model: they train, publish, resume and refuse bad input."""

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from adamba.tasks import TASKS
from adamba.training.agent_rows import preference_rows
from tiny_runs import DPO, GRPO, ROOT, save_agent

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_agent(folder)
    return folder


def write(recipe: dict, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"output_dir": str(folder / "out")}))
    return path


def run_here(script: str, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "src" / script), str(recipe)])
    import_module(script.removesuffix(".py")).main()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(("script", "recipe"), [("run_grpo.py", GRPO), ("run_dpo.py", DPO)])
def test_the_command_trains_and_publishes(script: str, recipe: dict, checkpoint: Path, tmp_path: Path) -> None:
    path = write(recipe | {"model_name_or_path": str(checkpoint)}, tmp_path)
    command = [sys.executable, str(ROOT / "src" / script), str(path), "--max_steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "calculator 1.0 (50.0 %), tic_tac_toe 1.0 (50.0 %)" in done.stderr
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["train_steps"] == 2 and metrics["tokens_seen"] > 0 and metrics["train_loss"] is not None
    assert {"recipe.yaml", "run.json", "README.md", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    before, after = weights(checkpoint), weights(out)
    assert before.keys() == after.keys()
    if script == "run_dpo.py":  # a random model's GRPO groups may all score alike, and then teach nothing
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert 0 <= metrics["preference_accuracy_last"] <= 1
    else:
        assert 0 <= metrics["reward_last"] <= sum(GRPO["rewards"].values())


@pytest.mark.parametrize(("script", "recipe"), [("run_grpo.py", GRPO), ("run_dpo.py", DPO)])
def test_lora_by_recipe_keys_alone(
    script: str, recipe: dict, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"use_peft": True, "lora_r": 4, "model_name_or_path": str(checkpoint), "max_steps": 1}
    run_here(script, write(recipe | keys, tmp_path), monkeypatch)
    before, after = weights(checkpoint), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_an_imitated_source_moves_the_model_by_its_supervised_term_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal turns the two halves of DPO's loss cancel: without the weight of the other term nothing moves."""
    keys = {"mix": {"calculator": 1.0}, "imitated": ["calculator"], "loss_type": ["sigmoid", "sft"], "max_steps": 1}
    # AdamW would make a whole step of what rounding leaves of the gradient.
    recipe = DPO | keys | {"model_name_or_path": str(checkpoint), "optim": "sgd", "learning_rate": 0.1}
    moved = {}
    for weight in (0.0, 1.0):
        folder = tmp_path / str(weight)
        folder.mkdir()
        run_here("run_dpo.py", write(recipe | {"loss_weights": [1.0, weight]}, folder), monkeypatch)
        before, after = weights(checkpoint), weights(folder / "out")
        moved[weight] = max((before[name] - after[name]).abs().max().item() for name in before)
    assert moved[0.0] < 1e-7 and moved[1.0] > 1e-3


def test_dpo_with_muon_takes_orthogonal_steps(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"use_muon": True, "learning_rate": 1.0e-2, "weight_decay": 0.0, "max_steps": 1}
    run_here("run_dpo.py", write(DPO | keys | {"model_name_or_path": str(checkpoint)}, tmp_path), monkeypatch)
    before, after = weights(checkpoint), weights(tmp_path / "out")
    steps = [after[name] - before[name] for name in before if name.endswith("self_attn.o_proj.weight")]
    assert steps
    for step in steps:
        # AdamW's first step is the rate in every entry, so several times as large here.
        assert 0.5e-2 < torch.linalg.matrix_norm(step, ord=2) < 2e-2


def test_dpo_on_trajectories_from_a_file(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [TASKS["tic_tac_toe"].preference(seed, "train") for seed in range(6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    files = {"data_files": {"pairs": str(tmp_path / "pairs.jsonl")}, "mix": {"pairs": 1.0}, "max_steps": 1}
    run_here("run_dpo.py", write(DPO | {"model_name_or_path": str(checkpoint)} | files, tmp_path), monkeypatch)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert set(run["input_paths"]) == {"model", "pairs"}


def test_grpo_without_tools(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"mix": {"calculator": 1.0}, "task_settings": {"calculator": {"tool_free": True}}, "max_steps": 1}
    run_here("run_grpo.py", write(GRPO | {"model_name_or_path": str(checkpoint)} | free, tmp_path), monkeypatch)
    assert (tmp_path / "out" / "metrics.json").is_file()


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_reference_keeps_no_cache_and_what_is_published_may(
    use_peft: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, trainers = import_module("run_grpo").train, []
    monkeypatch.setattr("run_grpo.train", lambda trainer: trainers.append(trainer) or trained(trainer))
    keys = {"beta": 0.1, "max_steps": 1, "use_peft": use_peft, "model_name_or_path": str(checkpoint)}
    run_here("run_grpo.py", write(GRPO | keys, tmp_path), monkeypatch)
    reference = trainers[0].ref_model
    assert reference is None if use_peft else not reference.config.use_cache
    assert json.loads((tmp_path / "out/config.json").read_text())["use_cache"] is True


def test_a_run_that_wrote_its_tokens_takes_no_step_more(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"max_generated_tokens": 1, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    path = write(GRPO | keys | {"model_name_or_path": str(checkpoint)}, tmp_path)
    found = []
    for _ in range(2):
        run_here("run_grpo.py", path, monkeypatch)
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
        found.append({key: metrics[key] for key in ("train_steps", "num_generated_tokens", "tokens_seen")})
    assert found[0] == found[1] and found[0]["train_steps"] == 1


def test_grpo_on_what_is_not_solved_yet(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change = {"model_name_or_path": str(checkpoint), "unsolved_fraction": 0.5, "max_steps": 1}
    run_here("run_grpo.py", write(GRPO | change, tmp_path), monkeypatch)
    assert "8 of 8 prompts are not solved yet; training on 8" in caplog.text


@pytest.mark.parametrize(
    ("script", "change", "message"),
    [
        ("run_grpo.py", {"rewards": {"speed": 1.0}}, "rewards: unknown reward 'speed'"),
        ("run_grpo.py", {"mix": {"chess": 1.0}}, "mix: 'chess' is unknown"),
        ("run_grpo.py", {"unsolved_fraction": 2.0}, "unsolved_fraction: 2.0 must be above 0 and at most 1"),
        ("run_grpo.py", {"task_settings": {"calculator": {"size": 3}}}, "unknown key 'size'"),
        ("run_dpo.py", {"num_pairs": 0}, "num_pairs: 0"),
        ("run_dpo.py", {"max_length": 20}, "max_length: 20 leaves nothing to learn in"),
        ("run_dpo.py", {"imitated": ["calculator"]}, "imitated: ['calculator'] teaches nothing with loss_type"),
        ("run_dpo.py", {"imitated": ["chess"], "loss_type": ["sft"]}, "imitated: 'chess' is not in the mix"),
        ("run_dpo.py", {"data_files": {"pairs": "no.jsonl"}, "mix": {"pairs": 1.0}}, "no.jsonl: cannot read"),
        ("run_grpo.py", {"num_prompts": 1}, "num_prompts: 1 left to train on"),
    ],
)
def test_bad_input_gets_one_line(
    script: str,
    change: dict,
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = {"run_grpo.py": GRPO, "run_dpo.py": DPO}[script]
    path = write(recipe | {"model_name_or_path": str(checkpoint)} | change, tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_here(script, path, monkeypatch)
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]


def test_pairs_keep_each_tools_own_arguments() -> None:
    rows = preference_rows(
        {"calculator": 1.0, "tic_tac_toe": 1.0}, 20, split="test", seed=1, settings={}, data_files={}
    )
    for row in rows:
        for message in row["prompt"] + row["chosen"] + row["rejected"]:
            for call in message.get("tool_calls") or []:
                assert list(call["function"]["arguments"]) == [
                    {"calculator": "expression", "play": "cell"}[call["function"]["name"]]
                ]


def test_the_reference_of_a_branch_of_the_hub_is_that_branch(checkpoint: Path, tmp_path: Path) -> None:
    """TRL loads it by name alone: from `main`, which may be another phase, or have no model at all."""
    cached, branch, commit = tmp_path / "hub" / "models--me--tiny", "phase5", "a" * 40
    shutil.copytree(checkpoint, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / branch).write_text(commit)
    keys = {"model_name_or_path": "me/tiny", "revision": branch, "max_steps": 1, "save_strategy": "steps"}
    path = write(DPO | keys | {"save_steps": 1}, tmp_path)
    command = [sys.executable, str(ROOT / "src" / "run_dpo.py"), str(path)]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (state,) = (tmp_path / "out.trainer").glob("*/checkpoint-1/trainer_state.json")
    first = json.loads(state.read_text())["log_history"][0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0, "nothing has moved yet"


@pytest.mark.parametrize(("script", "recipe"), [("run_dpo.py", DPO), ("run_grpo.py", GRPO | {"beta": 0.1})])
def test_a_model_without_a_checkpoint_has_no_reference(
    script: str, recipe: dict, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    new = {"depth": 4, "tokenizer_name_or_path": str(checkpoint)}
    with pytest.raises(SystemExit, match="2"):
        run_here(script, write(recipe | new, tmp_path), monkeypatch)
    assert "has no checkpoint to load the frozen reference from" in capsys.readouterr().err
