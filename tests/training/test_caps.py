"""`max_hours` and `max_cost_usd`: a run stops before it crosses them and keeps a checkpoint."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, GRPOConfig, SFTConfig

from adamba.errors import UserError
from adamba.training import caps
from adamba.training.agent_config import AgentConfig
from adamba.training.pretraining import PretrainConfig
from adamba.training.session import train
from adamba.training.sft import MixSFTConfig
from models import hybrid
from run_dpo import PreferenceConfig

HOUR = 3600.0


@pytest.fixture
def clock(monkeypatch):
    """Each training step takes an hour; a process has just begun."""
    now = {"time": 1000 * HOUR}

    class JustStarted:
        def create_time(self) -> float:
            return now["began"]

    now["began"] = now["time"]
    monkeypatch.setattr(caps, "psutil", SimpleNamespace(Process=JustStarted))  # others need the real one
    monkeypatch.setattr(caps.time, "time", lambda: now["time"])
    return now


def steps_take_an_hour(trainer, clock) -> None:
    step = trainer.training_step

    def slow_step(*args, **kwargs):
        clock["time"] += HOUR
        return step(*args, **kwargs)

    trainer.training_step = slow_step


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "trainer").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("cap", "message"),
    [
        ({"max_hours": 3.5}, r"max_hours: 3\.5 is used up \(3 h so far\); stopped after step 3 of 10"),
        (
            {"max_cost_usd": 5.0, "usd_per_gpu_hour": 2.0},
            r"max_cost_usd: 5 is used up \(2 h, \$4 so far\); stopped after step 2 of 10",
        ),
        ({"max_cost_usd": 99.0, "usd_per_gpu_hour": 2.0, "max_hours": 1.0}, r"max_hours: 1 is used up \(1 h, \$2 so"),
    ],
)
def test_a_cap_stops_before_the_step_that_would_cross_it(make_trainer, tmp_path, clock, cap, message) -> None:
    trainer = make_trainer(hybrid(0), **cap)
    steps_take_an_hour(trainer, clock)
    with pytest.raises(UserError, match=message):
        train(trainer)
    assert len(kept(tmp_path)) == 1, "saved although save_strategy is no"


def test_ranks_of_unequal_speed_stop_after_the_same_step(clock, tmp_path, monkeypatch) -> None:
    """Two ranks, a thread each; the last step took one of them longer."""
    met, given = threading.Barrier(2), {}
    args = PretrainConfig(output_dir=str(tmp_path), max_steps=10, max_hours=3.5, use_cpu=True, report_to="none")

    def all_reduce(value: torch.Tensor, _op: object) -> None:
        given[threading.get_ident()] = value.item()
        met.wait(timeout=60)
        value.fill_(max(given.values()))
        met.wait(timeout=60)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    clock["time"] += 2 * HOUR

    def stops(hours_of_a_step: float) -> bool:
        cap = caps.StopAtCap(args)
        cap.step_began = clock["time"] - hours_of_a_step * HOUR
        state = TrainerState(global_step=2, max_steps=10)
        return cap.on_step_end(args, state, TrainerControl()).should_training_stop

    with ThreadPoolExecutor(2) as ranks:
        assert list(ranks.map(stops, (1.0, 2.0))) == [True, True]


def test_a_raised_cap_goes_on_to_the_weights_of_a_run_without_one(make_trainer, tmp_path, clock) -> None:
    settings = {"max_steps": 4, "usd_per_gpu_hour": 3.0}
    whole = hybrid(0)
    train(make_trainer(whole, **settings, output_dir=str(tmp_path / "whole")))

    first = make_trainer(hybrid(0), **settings, max_hours=2.0)
    steps_take_an_hour(first, clock)
    with pytest.raises(UserError, match="stopped after step 2 of 4"):
        train(first)
    assert kept(tmp_path) == ["checkpoint-2"]
    spent = json.loads((tmp_path / "trainer" / caps.SPENT_FILE).read_text())
    assert spent["seconds"] == pytest.approx(2 * HOUR)

    with pytest.raises(UserError, match=r"max_hours: 2 is used up \(2 h, \$6 so far\); raise it to go on from"):
        caps.refuse_used_up(first.args)
    clock["time"] += 100 * HOUR  # nobody was there
    clock["began"] = clock["time"]
    model = hybrid(0)
    again = make_trainer(model, **settings, max_hours=4.5)
    steps_take_an_hour(again, clock)
    caps.refuse_used_up(again.args)
    trained = train(again)
    assert trained["train_steps"] == 4 and trained["cost_usd"] == pytest.approx(4 * 3.0)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_reaching_the_cap_with_the_last_step_finishes_the_run(make_trainer, clock) -> None:
    trainer = make_trainer(hybrid(0), max_steps=2, max_hours=2.0, usd_per_gpu_hour=1.0, logging_steps=1)
    steps_take_an_hour(trainer, clock)
    assert train(trainer)["train_steps"] == 2
    assert [entry["cost_usd"] for entry in trainer.state.log_history if "loss" in entry] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_hours": 0.0}, "max_hours: 0 must be above 0"),
        ({"max_cost_usd": 5.0}, "max_cost_usd: 5 needs usd_per_gpu_hour"),
        ({"usd_per_gpu_hour": -1.0}, "usd_per_gpu_hour: -1 must be above 0"),
    ],
)
def test_caps_that_cannot_work_are_refused(make_trainer, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(hybrid(0), **settings)


def test_a_broken_record_is_named(tmp_path) -> None:
    (tmp_path / caps.SPENT_FILE).write_text("{")
    with pytest.raises(UserError, match=r"spent\.json: not what a run wrote"):
        caps.read_spent(str(tmp_path))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (AgentConfig, GRPOConfig),
        (PreferenceConfig, DPOConfig),
        (MixSFTConfig, SFTConfig),
        (PretrainConfig, TrainingArguments),
    ],
)
def test_caps_leave_every_default_of_the_librarys_config(ours: type, theirs: type) -> None:
    own = {"trust_remote_code", *(vars(PretrainConfig)["__annotations__"] if ours is PretrainConfig else ())}
    fields = {field.name: field for field in dataclasses.fields(ours)}
    changed = [f.name for f in dataclasses.fields(theirs) if f.name not in own and fields[f.name].default != f.default]
    assert changed == []
    assert {"max_hours", "max_cost_usd", "usd_per_gpu_hour"} <= fields.keys()
