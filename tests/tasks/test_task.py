"""A task without a solver is played; where it would be imitated, one line says so."""

from dataclasses import replace

import pytest

from adamba.data import load_mixture
from adamba.data.arguments import DataArguments
from adamba.errors import UserError
from adamba.tasks import TASKS, no_solver
from adamba.tasks.task import Row
from adamba.training.agent_rows import preference_rows, prompt_rows

MESSAGE = "mix: task calculator has no solver to imitate; use it in run_grpo.py and run_eval.py"


@pytest.fixture
def unsolved(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = no_solver("calculator")
    monkeypatch.setitem(TASKS, "calculator", replace(TASKS["calculator"], example=refuse, preference=refuse))


@pytest.mark.usefixtures("unsolved")
def test_it_is_played_but_not_imitated() -> None:
    mix = {"calculator": 1.0}
    assert len(prompt_rows(mix, 4, split="train", seed=0, settings={})) == 4
    with pytest.raises(UserError, match=MESSAGE):
        next(iter(load_mixture(mix, split="train", seed=0)))
    with pytest.raises(UserError, match=MESSAGE):
        preference_rows(mix, 4, split="train", seed=0, settings={}, data_files={})


def prompt_without_settings(seed: int, split: str) -> Row:
    return {}


def prompt_with_one(seed: int, split: str, digits: int = 3) -> Row:
    return {}


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (prompt_without_settings, {"digits": 3}, "unknown key 'digits'; this task takes no settings"),
        (prompt_with_one, {"length": 3}, "unknown key 'length'; known keys are digits"),
        (prompt_with_one, 3, "3 needs a mapping"),
        (prompt_with_one, {"digits": 3}, None),
        (prompt_without_settings, {}, None),
    ],
)
def test_settings_that_a_task_does_not_take_are_refused_when_read(prompt, settings, message, monkeypatch) -> None:
    monkeypatch.setitem(TASKS, "calculator", replace(TASKS["calculator"], prompt=prompt))
    given = {"mix": {"calculator": 1.0}, "task_settings": {"calculator": settings}}
    if message is None:
        assert DataArguments(**given).task_settings == given["task_settings"]
        return
    with pytest.raises(UserError, match=f"^task_settings: calculator: {message}"):
        DataArguments(**given)
