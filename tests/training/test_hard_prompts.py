"""Prompts kept for reinforcement learning: all that are not solved, in the asked proportion to those that are."""

import pytest
from datasets import Dataset

from adamba.errors import UserError
from adamba.training import hard_prompts
from adamba.training.play import Episode

ROWS = Dataset.from_dict({"environment": ["calculator"] * 100, "seed": list(range(100)), "board": [None] * 100})


def solved_from(first: int):
    """A `play` in which instances below `first` are not solved."""

    def play(model, tokenizer, rows, max_new_tokens):
        assert all("board" not in row for row in rows), "a column that a task lacks must not reach its environment"
        return [Episode(row, [], outcome={"score": float(row["seed"] >= first)}) for row in rows]

    return play


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, 20), (1.0, 10), (0.05, 100), (0.75, 13)])
def test_keeps_every_unsolved_prompt_and_its_share_of_others(monkeypatch, fraction: float, expected: int) -> None:
    monkeypatch.setattr(hard_prompts, "play", solved_from(10))
    kept = hard_prompts.unsolved_first(None, None, ROWS, fraction, max_new_tokens=8)
    assert set(range(10)) <= set(kept["seed"])
    assert len(kept) == len(set(kept["seed"])) == expected
    again = hard_prompts.unsolved_first(None, None, ROWS, fraction, max_new_tokens=8)
    assert kept["seed"] == again["seed"], "every process must get the same rows in the same order"


def test_nothing_to_learn_is_said_in_one_line(monkeypatch) -> None:
    monkeypatch.setattr(hard_prompts, "play", solved_from(0))
    with pytest.raises(UserError, match=r"unsolved_fraction: the model solves all of 100 prompts"):
        hard_prompts.unsolved_first(None, None, ROWS, 0.5, max_new_tokens=8)
