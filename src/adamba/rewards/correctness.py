"""Correctness: what the task itself says the episode is worth."""

from collections.abc import Callable, Sequence
from typing import Any

from adamba.rewards.episodes import Completion, outcomes


def correctness(
    prompts: list,
    completions: list[Completion],
    environments: list[Any] | None = None,
    environment: Sequence[str] = (),
    log_metric: Callable[[str, float], None] | None = None,
    **columns: object,
) -> list[float]:
    """The task's own score: 1 for the solver's play, 0 for nothing achieved.

    Given the rows' `environment` column, the mean score of each task is logged apart.
    """
    scores = [outcome["score"] for outcome in outcomes(completions, environments)]
    if log_metric is not None:
        for name in sorted(set(environment)):
            own = [score for score, task in zip(scores, environment, strict=True) if task == name]
            log_metric(f"score_{name}", sum(own) / len(own))
    return scores
