"""Signals: a run saves and stops, or saves and goes on; started again it ends with the same weights."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from adamba.training import interruptions
from adamba.training.checkpoints import fault
from adamba.training.session import train
from models import hybrid

SETTINGS = {"max_steps": 6, "save_strategy": "no", "lr_scheduler_type": "linear"}


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """As at a terminal; a shell's background job, and so its tests, starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def signal_in_step(trainer, step: int, number: int) -> None:
    """The process gets the signal in the middle of this step."""
    original = trainer.training_step

    def interrupted(*args, **kwargs):
        if trainer.state.global_step == step:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    trainer.training_step = interrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_with_the_weights_of_an_uninterrupted_one(
    make_trainer, number: int, tmp_path: Path
) -> None:
    whole, stopped = hybrid(0), hybrid(0)
    train(make_trainer(whole, **SETTINGS))
    before = signal.getsignal(number)
    trainer = make_trainer(stopped, **SETTINGS)
    signal_in_step(trainer, 2, number)
    with pytest.raises(SystemExit) as exit_:
        train(trainer)
    assert exit_.value.code == 128 + number
    assert signal.getsignal(number) == before
    kept = [path.name for path in (tmp_path / "trainer").glob("checkpoint-*")]
    assert kept == ["checkpoint-3"], "the step was finished"
    resumed = hybrid(0)
    assert train(make_trainer(resumed, **SETTINGS))["train_steps"] == 6
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_sigusr1_saves_and_goes_on(make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer(hybrid(0), **SETTINGS)
    signal_in_step(trainer, 1, signal.SIGUSR1)
    assert train(trainer)["train_steps"] == 6
    (saved,) = (tmp_path / "trainer").glob("checkpoint-*")
    assert saved.name == "checkpoint-2" and fault(saved) is None


def two_signals(trainer) -> None:
    """In its first step."""
    original = trainer.training_step

    def twice(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # else Python may hear both as one
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    trainer.training_step = twice


@pytest.mark.parametrize("launcher", [False, True])
def test_a_second_signal_does_not_wait(launcher: bool, make_trainer, tmp_path: Path, monkeypatch) -> None:
    if launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setattr(interruptions, "ECHO_SECONDS", 0.01)
    trainer = make_trainer(hybrid(0), **SETTINGS)
    two_signals(trainer)
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    assert not list((tmp_path / "trainer").glob("checkpoint-*"))


def test_a_launchers_echo_of_a_signal_is_the_same_signal(make_trainer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    trainer = make_trainer(hybrid(0), **SETTINGS)
    two_signals(trainer)
    with pytest.raises(SystemExit) as stopped:
        train(trainer)
    assert stopped.value.code == 128 + signal.SIGINT
    assert fault(tmp_path / "trainer/checkpoint-1") is None


def test_a_signal_in_the_last_step_lets_the_run_finish(make_trainer) -> None:
    trainer = make_trainer(hybrid(0), **SETTINGS)
    signal_in_step(trainer, 5, signal.SIGTERM)
    assert train(trainer)["train_steps"] == 6
