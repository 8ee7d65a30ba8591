"""Killed at each point of the writing of a checkpoint: the last whole one is resumed from, to the same bits."""

import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import TrainerState

from adamba.training import checkpoints
from adamba.training.checkpoints import fault
from adamba.training.pretraining import PretrainTrainer
from adamba.training.session import train
from models import hybrid

SETTINGS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "save_total_limit": 1}
SETTINGS |= {"lr_scheduler_type": "linear"}
KILLED_AT = 4  # the step whose checkpoint is being written; the one of step 2 is whole


def kill(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Callable[[PretrainTrainer], object], name: str, last_act: Callable = kill):
    """Put `last_act` before a function's call that writes checkpoint-4. Only in a process that is lost anyway."""

    def arm(trainer: PretrainTrainer) -> None:
        original = getattr(owner(trainer), name)

        def fatal(*args, **kwargs):
            if trainer.state.global_step == KILLED_AT:
                last_act(*args)
            return original(*args, **kwargs)

        setattr(owner(trainer), name, fatal)

    return arm


def after(owner: Callable[[PretrainTrainer], object], name: str):
    def arm(trainer: PretrainTrainer) -> None:
        original = getattr(owner(trainer), name)
        before(owner, name, lambda *args: (original(*args), kill()))(trainer)

    return arm


def at_byte(share: float, name: str):
    """The kernel ends the process in the middle of a file's bytes, at this share of that file's size."""

    def arm(trainer: PretrainTrainer) -> None:
        def limit(*_) -> None:
            num_bytes = (Path(trainer.args.output_dir) / "checkpoint-2" / name).stat().st_size
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * num_bytes), resource.RLIM_INFINITY))

        before(lambda trainer: trainer, "_save", limit)(trainer)

    return arm


def half_a_state(_, path: str) -> None:
    Path(path).write_text('{"best_global_step": null, "epo')
    kill()


def half_removed(folder, *_) -> None:
    if Path(folder).name == "checkpoint-2":
        (Path(folder) / "model.safetensors").unlink()
        kill()


POINTS = {
    "before the model": before(lambda trainer: trainer, "_save"),
    "inside the model": at_byte(0.5, "model.safetensors"),
    "after the model": after(lambda trainer: trainer, "_save"),
    "inside the optimizer": at_byte(0.9, "optimizer.pt"),  # larger than the model, which is whole by then
    "before the random states": before(lambda trainer: trainer, "_save_rng_state"),
    "before the state": before(lambda _: TrainerState, "save_to_json"),
    "inside the state": before(lambda _: TrainerState, "save_to_json", half_a_state),
    "before the seal": before(lambda _: checkpoints, "seal"),
    "before the seal's rename": before(lambda _: os, "replace"),
    "after the seal": after(lambda _: checkpoints, "seal"),
    "inside the removal of the older one": before(lambda _: shutil, "rmtree", half_removed),
}
WHOLE_BY_THEN = ("after the seal", "inside the removal of the older one")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run that nobody killed; filled in by the first test."""
    return {}


def killed(trainer: PretrainTrainer, arm: Callable[[PretrainTrainer], None]) -> int:
    """The run in a process of its own, which dies; returns by which signal."""

    def run() -> None:
        logging.disable()
        arm(trainer)
        train(trainer)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout=300)
    return -(process.exitcode or 0)


@pytest.mark.parametrize("point", POINTS)
def test_the_last_whole_checkpoint_is_resumed_from(point: str, make_trainer, whole, tmp_path: Path) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
    if not whole:
        model = hybrid(0)
        train(make_trainer(model, **SETTINGS | {"output_dir": str(tmp_path / "whole"), "save_strategy": "no"}))
        whole |= model.state_dict()
    assert killed(make_trainer(hybrid(0), **SETTINGS), POINTS[point]) in (signal.SIGKILL, signal.SIGXFSZ)
    folder, last = tmp_path / "trainer", 4 if point in WHOLE_BY_THEN else 2
    assert [step for step in (2, 4) if fault(folder / f"checkpoint-{step}") is None][-1:] == [last]

    model = hybrid(0)
    trainer = make_trainer(model, **SETTINGS)
    steps, step = [], trainer.training_step
    trainer.training_step = lambda *args, **kwargs: steps.append(trainer.state.global_step) or step(*args, **kwargs)
    train(trainer)
    assert steps == list(range(last, 6))
    for name, tensor in whole.items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    (kept,) = folder.glob("checkpoint-*")
    assert kept.name == "checkpoint-6" and fault(kept) is None
    assert json.loads((kept / "trainer_state.json").read_text())["global_step"] == 6
