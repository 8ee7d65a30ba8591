"""The scripts in a row on a minuscule model: base, insert, Mamba, elastic, expand, train, slice, evaluate."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from adamba.loading import ModelArguments, load_model_and_tokenizer
from adamba.model import AdambaForCausalLM
from adamba.model.decoding_adamba import OPTIONS
from adamba.publish import verify_files
from tiny_runs import DATA, HYBRID, LEVELS, TRAIN, runner, tensors, write_recipe

pytestmark = pytest.mark.smoke
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
SURGERY = DATA | {"num_check_rows": 2}
RECIPES: dict[str, tuple[str, dict]] = {
    "base": ("run_pretrain.py", TRAIN | {"model_config": LLAMA, "vocab_size": 320}),
    "phase0": (
        "run_surgery.py",
        SURGERY
        | {"operation": "insert", "model_name_or_path": "base", "width_levels": LEVELS, "hybrid_config": HYBRID},
    ),
    "phase1": ("run_pretrain.py", TRAIN | {"model_name_or_path": "phase0", "train_only": "mamba"}),
    "phase2": (
        "run_pretrain.py",
        TRAIN
        | {"model_name_or_path": "phase1", "elastic": True, "sort_by_importance": True, "num_calibration_rows": 4},
    ),
    "phase3a": (
        "run_surgery.py",
        SURGERY
        | {
            "operation": "expand",
            "model_name_or_path": "phase2",
            "hidden_size": 40,
            "width_levels": {"ghost": 8, "normal": 16, "think": 40},
        },
    ),
    "phase3b": (
        "run_pretrain.py",
        TRAIN | {"model_name_or_path": "phase3a", "elastic": True, "old_weight_lr_scale": 0.5, "use_muon": True},
    ),
    "slice16": (
        "run_surgery.py",
        SURGERY | {"operation": "slice", "model_name_or_path": "phase3b", "width": "normal"},
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All phases, each published in the folder of its name; then `run_eval.py` on the last trained one."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        run = runner(monkeypatch)
        for name, (script, recipe) in RECIPES.items():
            run(script, write_recipe(folder / f"{name}.yaml", recipe | {"output_dir": name}))
        evaluation = DATA | {"num_rows": 4, "exit_thresholds": [0.5, 1.0], "num_episodes": {"calculator": 2}}
        evaluation |= {"max_new_tokens": 8, "num_sweep_episodes": {"calculator": 2}, "sweep_thresholds": [0.5]}
        path = write_recipe(folder / "eval.yaml", evaluation)
        chance = "risk=0.5,confidence=0.6,trials=4"
        run("run_eval.py", path, "--model_name_or_path", "phase3b", "--calibrate", chance)
        run(
            "run_eval.py",
            path,
            "--model_name_or_path",
            "slice16",
            "--num_episodes",
            "{}",
            "--num_sweep_episodes",
            "{}",
            "--calibrate",
            chance,
        )
    return folder


def metrics(runs: Path, name: str) -> dict:
    return json.loads((runs / name / "metrics.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_each_run_publishes_a_whole_checkpoint(runs: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    files = {file.name for file in (runs / name).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "run.json", "README.md"} <= files
    verify_files(name)
    assert not list(runs.glob(f"{name}.tmp")) and not list(runs.glob(f"{name}.previous"))
    model = AutoModelForCausalLM.from_pretrained(runs / name)
    assert isinstance(model, LlamaForCausalLM if name == "base" else AdambaForCausalLM)
    assert metrics(runs, name)["num_parameters"] == model.num_parameters()
    assert model.config.use_cache, "the Trainer switches it off while it trains"


@pytest.mark.parametrize("name", [name for name, (script, _) in RECIPES.items() if script == "run_pretrain.py"])
def test_training_metrics(runs: Path, name: str) -> None:
    found = metrics(runs, name)
    assert found["train_steps"] == 4 and found["tokens_seen"] == 4 * 4 * 64
    assert math.isfinite(found["train_loss"]) and found["train_loss"] > 0
    for key in ("hidden_size", "train_seconds", "tokens_per_second", "train_flops", "peak_memory_bytes"):
        assert found[key] > 0, key
    logged = json.loads((runs / name / "log_history.json").read_text())
    assert {"loss_calculator", "loss_tic_tac_toe"} <= {key for entry in logged for key in entry}
    if name in ("phase2", "phase3b"):
        assert {"loss_full", "exit_loss", "gate_loss"} <= {key for entry in logged for key in entry}


@pytest.mark.parametrize("name", ["phase0", "phase3a", "slice16"])
def test_surgery_metrics(runs: Path, name: str) -> None:
    found = metrics(runs, name)
    assert found["max_abs_logit_diff"] <= 1e-4
    assert found["loss_after"] == pytest.approx(found["loss_before"], abs=1e-4)
    if name == "phase3a":
        assert {f"max_abs_logit_diff_width_{width}" for width in (8, 16, 32)} <= found.keys()


def test_phase_1_trained_mamba_only(runs: Path) -> None:
    before, after = tensors(runs / "phase0"), tensors(runs / "phase1")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".layers.1." in name or ".layers.3." in name for name in moved)


def test_a_slice_is_smaller(runs: Path) -> None:
    whole, part = metrics(runs, "phase3b"), metrics(runs, "slice16")
    assert part["num_parameters"] < whole["num_parameters"]
    assert part["eval_loss"] == pytest.approx(whole["eval_loss_width_16"], abs=1e-4)


def test_evaluation_metrics(runs: Path) -> None:
    found = metrics(runs, "phase3b")
    expected = {"eval_loss", "eval_loss_calculator", "eval_loss_tic_tac_toe", "flops_per_token", "gate_ece"}
    expected |= {"gate_ece_layer_1", "gate_ece_layer_2", "accuracy_calculator", "valid_tool_call_rate_calculator"}
    for width in (8, 16, 40):
        expected |= {
            f"eval_loss_width_{width}",
            f"flops_per_token_width_{width}",
            f"accuracy_calculator_width_{width}",
        }
        expected |= {f"eval_loss_width_{width}_calculator", f"eval_loss_width_{width}_tic_tac_toe"}
    for threshold in ("0.5", "1"):
        expected |= {f"{key}_threshold_{threshold}" for key in ("exit_fraction", "agreement", "flops_per_token")}
    expected |= {"accuracy_calculator_threshold_0.5", *(f"gate_bin_{index}_count" for index in range(10))}
    assert expected <= found.keys(), expected - found.keys()
    assert all(math.isfinite(found[key]) for key in expected)
    assert found["eval_loss"] == pytest.approx(found["eval_loss_width_40"], abs=1e-6)
    assert found["exit_fraction_threshold_1"] == 0 and found["agreement_threshold_1"] == 1
    assert found["eval_loss_threshold_1"] == pytest.approx(found["eval_loss"], abs=1e-4)
    assert found["flops_per_token_width_8"] < found["flops_per_token_width_16"] < found["flops_per_token_width_40"]
    assert {"train_loss", "train_steps"} <= found.keys(), "an evaluation adds to what training measured"


@pytest.mark.parametrize(("name", "unit"), [("phase3b", "episodes"), ("slice16", "rows")])
def test_the_calibrated_threshold_is_in_the_checkpoint(
    runs: Path, name: str, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    verify_files(name)  # run.json knows the new generation_config.json
    found = metrics(runs, name)
    threshold = json.loads((runs / name / "generation_config.json").read_text())["exit_threshold"]
    assert found["calibrated_exit_threshold"] == threshold
    assert (found["calibration_unit"], found["calibration_risk"], found["calibration_trials"]) == (unit, 0.5, 4)
    assert "calibration_bound_threshold_0.999" in found
    measured = json.loads((runs / name / "run.json").read_text())["measured"]
    assert "calibrated_exit_threshold" in measured["calibration"], "a later evaluation without it would lose it"
    assert any(str(runs / "eval.yaml") in asked and "eval_loss" in keys for asked, keys in measured.items())
    model, _ = load_model_and_tokenizer(ModelArguments(model_name_or_path=name))
    assert model.generation_config.exit_threshold == threshold
    trained_on, _ = load_model_and_tokenizer(ModelArguments(model_name_or_path=name), training=True)
    assert trained_on.generation_config.exit_threshold is None
    assert not any(getattr(trained_on.generation_config, key, None) for key in OPTIONS), "episodes keep their caches"


def test_the_same_surgery_has_the_same_fingerprint_and_weights(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    first = json.loads((runs / "phase3a/run.json").read_text())
    shutil.copytree(runs / "phase3a", runs / "earlier", dirs_exist_ok=True)
    runner(monkeypatch)("run_surgery.py", "phase3a.yaml")
    second = json.loads((runs / "phase3a/run.json").read_text())
    assert (first["fingerprint"], first["files"]) == (second["fingerprint"], second["files"])
    runner(monkeypatch)("run_surgery.py", "phase3a.yaml", "--seed", "1", "--output_dir", "other")
    other = json.loads((runs / "other/run.json").read_text())
    assert other["fingerprint"] != first["fingerprint"]
    assert other["files"]["model.safetensors"]["sha256"] != first["files"]["model.safetensors"]["sha256"]
