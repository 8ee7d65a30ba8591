"""Tool use: calls that are valid and needed, out of all calls made."""

from typing import Any

from adamba.rewards.episodes import Completion, outcomes, share_of_calls


def tool_use(
    prompts: list, completions: list[Completion], environments: list[Any] | None = None, **columns: object
) -> list[float]:
    """Share of useful calls: valid ones, no more than the solver needs, out of all calls made or needed.

    Too few calls, refused calls and repeated calls all lower it. A task without tools gives 1 for making no call.
    """
    return [
        share_of_calls(outcome["valid_calls"], completion, outcome)
        for completion, outcome in zip(completions, outcomes(completions, environments), strict=True)
    ]
