"""What a run may be resumed from: whole checkpoints of the very same run."""

import json
import re
import resource
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from adamba.errors import UserError
from adamba.training import checkpoints
from adamba.training.checkpoints import SEAL, checkpoint_to_resume, differences, fault, last_checkpoint, seal, sign
from adamba.training.session import train
from models import hybrid

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def write_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    (path / "model.safetensors").write_text("weights")
    (path / "global_step" / "optimizer.pt").write_text("moments")
    return path


def test_only_whole_checkpoints_are_resumed_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert last_checkpoint(tmp_path / "absent") is None
    paths = {step: write_checkpoint(tmp_path, step) for step in (9, 10, 100)}
    assert last_checkpoint(tmp_path) is None, "none was sealed"
    for step in (9, 10):
        seal(paths[step])
    assert last_checkpoint(tmp_path) == str(paths[10]), "numbers, not letters; and 100 was interrupted"
    assert "checkpoint-100 is passed over: interrupted while it was written" in caplog.text


def test_machines_that_see_other_checkpoints_are_told_at_once(tmp_path: Path, monkeypatch) -> None:
    seal(write_checkpoint(tmp_path, 4))
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None, world_size=3)
    trainer = SimpleNamespace(args=args, accelerator=SimpleNamespace(wait_for_everyone=lambda: None))
    monkeypatch.setattr(checkpoints, "gather_object", lambda found: found * 3)
    assert checkpoint_to_resume(trainer) == str(tmp_path / "checkpoint-4")
    monkeypatch.setattr(checkpoints, "gather_object", lambda found: [*found, *found, "none"])
    with pytest.raises(UserError, match="process 0 would resume from checkpoint-4, process 2 from none; all machines"):
        checkpoint_to_resume(trainer)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda path: (path / "model.safetensors").write_text("weigh"), "model.safetensors has 5 bytes instead of 7"),
        (lambda path: (path / "global_step/optimizer.pt").write_text("mOments"), "the content of global_step/optim"),
        (lambda path: (path / SEAL).write_text('{"model.safe'), f"{SEAL} is not readable"),
        (lambda path: (path / SEAL).write_text('["model.safetensors"]'), f"{SEAL} is not readable"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, reason: str, tmp_path: Path, caplog) -> None:
    for step in (2, 4):
        seal(write_checkpoint(tmp_path, step))
    damage(tmp_path / "checkpoint-4")
    assert fault(tmp_path / "checkpoint-4").startswith(reason)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert reason in caplog.text


def test_older_checkpoints_go_only_after_the_seal(make_trainer, tmp_path: Path, monkeypatch) -> None:
    trainer = make_trainer(hybrid(0), save_total_limit=1, **SAVING)

    def dying_seal(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-4":
            raise KeyboardInterrupt
        seal(checkpoint)

    monkeypatch.setattr("adamba.training.checkpoints.seal", dying_seal)
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    assert last_checkpoint(tmp_path / "trainer") == str(tmp_path / "trainer/checkpoint-2")
    monkeypatch.undo()
    train(make_trainer(hybrid(0), save_total_limit=1, **SAVING))
    assert [path.name for path in (tmp_path / "trainer").glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_full_disk_stops_in_one_line_and_keeps_the_last_good_checkpoint(make_trainer, tmp_path: Path) -> None:
    """The limit on a file's size stands for the end of the disk: writing fails in the middle of a file."""
    trainer = make_trainer(hybrid(0), **SAVING)
    step, limits = trainer.training_step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling_step(*args, **kwargs):
        if trainer.state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return step(*args, **kwargs)

    trainer.training_step = filling_step
    try:
        with pytest.raises(
            UserError, match="cannot be written: .*; the last good checkpoint is .*checkpoint-2"
        ) as stop:
            train(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(stop.value)
    assert [path.name for path in (tmp_path / "trainer").glob("checkpoint-*")] == ["checkpoint-2"]
    assert train(make_trainer(hybrid(0), **SAVING))["train_steps"] == 4


def test_a_disk_too_small_is_refused_before_the_first_step(make_trainer, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    trainer = make_trainer(hybrid(0), **SAVING)
    trainer.training_step = lambda *args, **kwargs: pytest.fail("a step was taken")
    message = r"output_dir: .*trainer needs \S+ GB for 3 checkpoints and the result, but its disk has 1e-06 GB free"
    with pytest.raises(UserError, match=message):
        train(trainer)


def test_a_folder_of_another_run_is_refused_with_its_differences(make_trainer, tmp_path: Path) -> None:
    ours = {"code": "c", "inputs": "i", "values": {"learning_rate": 0.1, "max_steps": 4, "logging_steps": 1}}
    theirs = {"code": "c", "inputs": "j", "values": {"learning_rate": 0.2, "logging_steps": 9, "seed": 1}}
    # the same rows in a step, spread otherwise, are the same batches
    ours["values"]["per_device_train_batch_size"], theirs["values"]["gradient_accumulation_steps"] = 4, 2
    ours["rows_per_step"], theirs["rows_per_step"] = 8, 8
    sign(tmp_path / "trainer", ours)
    sign(tmp_path / "other", theirs)
    seal(write_checkpoint(tmp_path / "other", 2))
    expected = ["learning_rate: 0.2 there, 0.1 here", "max_steps: unset there, 4 here", "seed: 1 there, unset here"]
    assert differences(tmp_path / "other", ours) == [*expected, "other inputs"]
    for named in (tmp_path / "other", tmp_path / "other/checkpoint-2"):
        message = f"resume_from_checkpoint: {named} is of another run ({'; '.join(expected)}; other inputs)"
        with pytest.raises(UserError, match=re.escape(message)):
            train(make_trainer(hybrid(0), resume_from_checkpoint=str(named), **SAVING))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        train(make_trainer(hybrid(0), resume_from_checkpoint=str(tmp_path / "nowhere"), **SAVING))
    (tmp_path / "other/run.json").unlink()
    with pytest.raises(UserError, match="does not say which run it is of"):
        train(make_trainer(hybrid(0), resume_from_checkpoint=str(tmp_path / "other"), **SAVING))


def test_a_moved_folder_of_the_same_run_is_resumed_from(make_trainer, tmp_path: Path) -> None:
    record = {"code": "c", "inputs": "i", "values": {"max_steps": 4}, "rows_per_step": 4}
    sign(tmp_path / "trainer", record)
    train(make_trainer(hybrid(0), **SAVING))
    shutil.rmtree(tmp_path / "trainer/checkpoint-4")
    (tmp_path / "trainer").rename(tmp_path / "moved")
    sign(tmp_path / "trainer", record)
    trainer = make_trainer(hybrid(0), resume_from_checkpoint=str(tmp_path / "moved"), **SAVING)
    steps, step = [], trainer.training_step
    trainer.training_step = lambda *args, **kwargs: steps.append(trainer.state.global_step) or step(*args, **kwargs)
    train(trainer)
    assert steps == [2, 3]
    state = json.loads((tmp_path / "trainer/checkpoint-4/trainer_state.json").read_text())
    assert state["global_step"] == 4
