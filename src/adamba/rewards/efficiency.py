"""Efficiency: the cost of an episode in turns, counted only as far as it succeeded."""

from typing import Any

from adamba.rewards.episodes import Completion, assistant_turns, outcomes


def efficiency(
    prompts: list, completions: list[Completion], environments: list[Any] | None = None, **columns: object
) -> list[float]:
    """The solver's number of turns over those taken (at most 1), times the score: giving up early earns nothing."""
    rewards = []
    for completion, outcome in zip(completions, outcomes(completions, environments), strict=True):
        best_turns = outcome["best_calls"] + 1
        rewards.append(outcome["score"] * min(1.0, best_turns / max(1, len(assistant_turns(completion)))))
    return rewards
