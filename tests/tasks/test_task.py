"""A task without a solver is played; where it would be imitated, one line says so."""

from dataclasses import replace

import pytest

from adamba.data import load_mixture
from adamba.errors import UserError
from adamba.tasks import TASKS, no_solver
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
