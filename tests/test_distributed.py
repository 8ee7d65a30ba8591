"""
Two processes (gloo) against one: the same losses, checkpoints that either goes on from, a plain checkpoint at the end.

`test_sharding.py` is the same where the model itself is split.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from adamba.model import AdambaForCausalLM
from adamba.training.pretraining import PretrainTrainer
from processes import (
    STEPS,
    assert_close,
    checkpoints,
    largest_difference,
    launch,
    losses,
    without_step,
    write_elastic_recipe,
)
from tiny_runs import tensors


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two`: the same recipe on one process and on two; elastic, so widths and exits are drawn."""
    folder = tmp_path_factory.mktemp("distributed")
    write_elastic_recipe(folder)
    launch(1, folder, folder / "recipe.yaml", "--output_dir", folder / "one")
    launch(2, folder, folder / "recipe.yaml", "--output_dir", folder / "two", config="ddp_cpu")
    return folder


def test_two_processes_have_the_losses_of_one(ran: Path) -> None:
    one, two = losses(ran / "one"), losses(ran / "two")
    assert len(one) == len(two) == STEPS and one[-1] < one[0]
    assert largest_difference(ran / "one", ran / "two") <= 1e-5
    assert (checkpoints(ran / "two") / f"checkpoint-{STEPS}/rng_state_1.pth").is_file(), "there was a second process"
    assert_close(ran / "one", ran / "two")
    logs = [json.loads((ran / name / "log_history.json").read_text()) for name in ("one", "two")]
    for alone, together in zip(*logs, strict=True):  # of each source, width and exit: the rows of both
        keys = {key for key in alone if "loss" in key or key.startswith("agreement")}
        assert keys <= together.keys() and (len(keys) > 4 or "train_loss" in keys)
        assert {key: together[key] for key in keys} == pytest.approx({key: alone[key] for key in keys}, abs=1e-4)
    model = AdambaForCausalLM.from_pretrained(ran / "two")
    assert model.num_parameters() == json.loads((ran / "two/metrics.json").read_text())["num_parameters"]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_of_two_processes_goes_on_in_one_or_two(ran: Path, num_processes: int, tmp_path: Path) -> None:
    kept = without_step(ran / "two", STEPS, tmp_path / "kept")
    where = ("--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", kept)
    config = "ddp_cpu" if num_processes == 2 else None
    output = launch(num_processes, tmp_path, ran / "recipe.yaml", *where, config=config)
    assert f"resuming from {kept}/checkpoint-{STEPS // 2}" in output
    if num_processes == 2:
        expected, found = tensors(ran / "two"), tensors(tmp_path / "resumed")
        assert all(torch.equal(expected[name], found[name]) for name in expected), "the same bits"
    else:
        assert_close(ran / "two", tmp_path / "resumed")


def test_a_signal_to_one_process_stops_both_after_the_same_step(ran: Path, tmp_path: Path, monkeypatch) -> None:
    step = PretrainTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3 and self.args.process_index == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", interrupted)  # the forks inherit it
    with pytest.raises(AssertionError, match=r"\[143, 143\]"):
        launch(2, tmp_path, ran / "recipe.yaml", "--output_dir", tmp_path / "out", config="ddp_cpu")
    assert (checkpoints(tmp_path / "out") / "checkpoint-4/complete.json").is_file()


def test_another_number_of_rows_per_step_is_refused(ran: Path, tmp_path: Path) -> None:
    shutil.copytree(ran / "two.trainer", tmp_path / "out.trainer")
    with pytest.raises(AssertionError, match="rows_per_step: 4 there, 2 here"):
        # the same recipe, which says 2 rows for each process, now on one
        launch(1, tmp_path, ran / "recipe.yaml", "--output_dir", tmp_path / "out", rows=2)
