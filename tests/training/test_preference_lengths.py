"""Pairs that `max_length` leaves nothing of are refused, cut ones counted."""

from types import SimpleNamespace

import pytest

from adamba.errors import UserError
from adamba.training.preference_lengths import check_lengths


def pair(prompt: int, chosen: list[int], rejected: list[int]) -> dict[str, list[int]]:
    return {"prompt_ids": [0] * prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def config(max_length: int | None, truncation_mode: str = "keep_start") -> SimpleNamespace:
    return SimpleNamespace(max_length=max_length, truncation_mode=truncation_mode)


SHORT, LONG = pair(4, [1, 2, 3], [1, 2, 4]), pair(4, [1, 2, 5, 6, 7, 8, 9, 3], [1, 2, 5, 6, 7, 8, 9, 4])


def test_pairs_that_fit_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    check_lengths([SHORT, LONG], 2, config(12))
    check_lengths([SHORT, LONG], 2, config(None))
    assert not caplog.records


def test_cut_and_dropped_pairs_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    check_lengths([SHORT, SHORT, SHORT, LONG], 5, config(10))
    [record] = caplog.records
    assert "max_length: 10 cuts 1 of 5 pairs, 1 of them before their answers differ; 1 more" in record.getMessage()


def test_nothing_left_in_most_pairs_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_length: 10 leaves nothing to learn in 2 of 3 pairs \(0 prompts fill"):
        check_lengths([LONG, SHORT, LONG], 3, config(10))
    with pytest.raises(UserError, match=r"max_length: 4 leaves nothing .* 3 of 3 pairs \(3 prompts fill it, 0 ans"):
        check_lengths([], 3, config(4))
    check_lengths([LONG, LONG], 2, config(10, "keep_end"))


def test_an_imitated_pair_needs_an_answer_and_no_difference() -> None:
    same = pair(4, [1, 2, 3], [1, 2, 3])
    check_lengths([same], 1, config(5))
    with pytest.raises(UserError, match="leaves nothing to learn in 1 of 1 pairs"):
        check_lengths([same], 1, config(4))
