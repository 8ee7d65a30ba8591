"""Tool use: calls that are valid and needed, out of all calls made."""

from typing import Any

from adamba.rewards.episodes import Completion, num_calls, outcomes


def tool_use(
    prompts: list, completions: list[Completion], environments: list[Any] | None = None, **columns: object
) -> list[float]:
    """Share of useful calls: valid ones, no more than the solver needs, out of all calls made or needed.

    Too few calls, refused calls and repeated calls all lower it. A task without tools gives 1 for making no call.
    """
    rewards = []
    for completion, outcome in zip(completions, outcomes(completions, environments), strict=True):
        needed = outcome["best_calls"]
        made = max(num_calls(completion), outcome["valid_calls"] + outcome["invalid_calls"])
        all_calls = max(made, needed)
        rewards.append(min(outcome["valid_calls"], needed) / all_calls if all_calls else 1.0)
    return rewards
