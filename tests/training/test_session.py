"""Around `trainer.train()`: a broken loss stops the run in time, and a resume measures what it should."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from adamba.errors import UserError
from adamba.training import session
from adamba.training.session import train
from models import hybrid


def test_a_broken_loss_stops_before_it_is_saved(make_trainer, tmp_path: Path) -> None:
    model = hybrid(0)
    trainer = make_trainer(model, save_strategy="steps", save_steps=2, save_total_limit=1, logging_steps=100)
    step = trainer.training_step

    def breaking_step(*args, **kwargs):
        if trainer.state.global_step == 5:
            with torch.no_grad():
                model.lm_head.weight[5, 0] = math.nan
        return step(*args, **kwargs)

    trainer.training_step = breaking_step
    with pytest.raises(UserError, match=r"learning_rate: 0\.01 is too high, loss became nan by step 6; the last good"):
        train(trainer)
    (kept,) = (tmp_path / "trainer").glob("checkpoint-*")
    assert kept.name == "checkpoint-4"


def test_a_run_stopped_after_its_last_step_is_not_trained_further(make_trainer) -> None:
    """Killed between its last checkpoint and publishing."""
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "logging_steps": 2}
    trained, model = hybrid(0), hybrid(0)
    first = train(make_trainer(trained, **settings))
    again = train(make_trainer(model, **settings))
    assert first["train_steps"] == again["train_steps"] == 8
    assert again["train_loss"] == pytest.approx(first["train_loss"], rel=1e-3)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_resumed_run_measures_its_own_steps(make_trainer, tmp_path: Path, monkeypatch) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "logging_steps": 2}
    first = train(make_trainer(hybrid(0), **settings))
    shutil.rmtree(tmp_path / "trainer" / "checkpoint-8")
    clock = iter((100.0, 102.0))
    monkeypatch.setattr(session.time, "monotonic", lambda: next(clock))
    again = train(make_trainer(hybrid(0), **settings))
    assert again["train_steps"] == 8
    assert again["train_seconds"] == pytest.approx(4.0), "2 seconds for half of the steps"
    assert 0 < again["train_loss"] < first["train_loss"]
