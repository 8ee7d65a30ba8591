"""What an evaluation says of exits, and how many games it plays."""

import pytest

from adamba.errors import UserError
from adamba.flops import flops_per_token
from adamba.training.evaluation import check_tasks, exit_metrics, observe_exits
from models import hybrid


def test_a_token_that_never_exits_costs_what_the_full_width_costs() -> None:
    """At the same length: exits and widths stand on one axis in the report."""
    model = hybrid(0).eval()
    ids = list(range(1, 33))
    rows = {"text": [{"input_ids": ids, "labels": ids, "position_ids": list(range(32))}]}
    metrics = exit_metrics(model, observe_exits(model, rows, 1), [0.0, 1.0], context_length=32)
    full = flops_per_token(model.config, context_length=32)
    assert metrics["flops_per_token_threshold_1"] == pytest.approx(full)
    assert metrics["flops_per_token_threshold_0"] < full


def test_games_that_two_sides_cannot_share_are_refused_before_anything() -> None:
    with pytest.raises(UserError, match="num_episodes: tic_tac_toe=1 must be even"):
        check_tasks("num_episodes", {"tic_tac_toe": 1})
    check_tasks("num_episodes", {"tic_tac_toe": 2, "calculator": 1})
