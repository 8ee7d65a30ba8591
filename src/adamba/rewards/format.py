"""Format: one call a turn and nothing around it, then a last turn as the task wants it."""

from typing import Any

from adamba.rewards.episodes import Completion, assistant_turns, outcomes


def format_reward(
    prompts: list, completions: list[Completion], environments: list[Any] | None = None, **columns: object
) -> list[float]:
    """1 when every turn before the last is exactly one call and the last one is well formed, else 0.

    A turn that is well formed but wrong still earns this, so keep its weight below that of correctness.
    """
    rewards = []
    for completion, outcome in zip(completions, outcomes(completions, environments), strict=True):
        calls = assistant_turns(completion)[:-1]
        clean = all(len(turn.get("tool_calls") or ()) == 1 and not turn.get("content") for turn in calls)
        rewards.append(outcome["well_formed"] if clean else 0.0)
    return rewards


format_reward.__name__ = "format"  # the name TRL logs
