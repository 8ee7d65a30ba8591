"""A run that was killed goes on where its last checkpoint stands, and ends with the very same weights."""

import json
from pathlib import Path

import pytest
import torch

from adamba.training.pretraining import PretrainTrainer
from tiny_runs import TRAIN, runner, save_hybrid, tensors, write_recipe


class Killed(Exception):
    """Stands for a process that dies between two checkpoints."""


@pytest.fixture(scope="module")
def hybrid_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid")
    save_hybrid(folder)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"elastic": True, "sort_by_importance": True, "num_calibration_rows": 4},
        {"use_muon": True, "lr_scheduler_type": "cosine", "warmup_steps": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["elastic", "muon"],
)
def test_resumed_weights_are_bitwise_those_of_an_uninterrupted_run(
    changes: dict, hybrid_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = TRAIN | {
        "model_name_or_path": str(hybrid_checkpoint),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
    }
    run, path = runner(monkeypatch), write_recipe(tmp_path / "recipe.yaml", recipe | changes)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run("run_pretrain.py", path, "--output_dir", whole)

    step = PretrainTrainer.training_step

    def dying_step(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "training_step", dying_step)
        with pytest.raises(Killed):
            run("run_pretrain.py", path, "--output_dir", killed)
    assert not killed.exists(), "a checkpoint is complete or absent"
    (kept,) = (tmp_path / "killed.trainer").glob("*/checkpoint-*")
    assert kept.name == "checkpoint-4"

    torch.manual_seed(99)  # the new process starts anywhere
    resumed_steps = []
    with monkeypatch.context() as patch:
        patch.setattr(
            PretrainTrainer,
            "training_step",
            lambda self, *args, **kwargs: resumed_steps.append(self.state.global_step) or step(self, *args, **kwargs),
        )
        run("run_pretrain.py", path, "--output_dir", killed)
    assert set(resumed_steps) == {4, 5}, "it started anew instead of resuming"
    expected, resumed = tensors(whole), tensors(killed)
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
    assert not torch.equal(
        expected["model.embed_tokens.weight"], tensors(hybrid_checkpoint)["model.embed_tokens.weight"]
    )
    assert json.loads((killed / "metrics.json").read_text())["train_steps"] == 6
