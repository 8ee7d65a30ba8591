"""Tool calls graded in three parts: the right name, the right argument names, the right argument values.

Each is a share of the calls made, or of those needed where fewer were made, so that a call too many or too few lowers
all three. A task that needs no call gives 1 for making none.
"""

import inspect
from collections.abc import Callable
from typing import Any

from adamba.rewards.episodes import Completion, assistant_turns, outcomes, share_of_calls
from adamba.tasks import tool_methods


def tool_name(
    prompts: list, completions: list[Completion], environments: list[Any] | None = None, **columns: object
) -> list[float]:
    """Share of calls that name a tool of the environment."""
    return _graded(completions, environments, lambda call, tools: call.get("name") in tools)


def tool_argument_names(
    prompts: list, completions: list[Completion], environments: list[Any] | None = None, **columns: object
) -> list[float]:
    """Share of calls whose arguments are exactly those that the tool takes, by name."""

    def has_them(call: dict, tools: dict[str, set[str]]) -> bool:
        arguments = call.get("arguments")
        return isinstance(arguments, dict) and tools.get(call.get("name", "")) == arguments.keys()

    return _graded(completions, environments, has_them)


def tool_argument_values(
    prompts: list, completions: list[Completion], environments: list[Any] | None = None, **columns: object
) -> list[float]:
    """Share of calls whose values are right: what the task reports as good calls (valid ones where it cannot tell)."""
    rewards = []
    for completion, outcome in zip(completions, outcomes(completions, environments), strict=True):
        rewards.append(share_of_calls(outcome.get("good_calls", outcome["valid_calls"]), completion, outcome))
    return rewards


def _graded(
    completions: list[Completion],
    environments: list[Any] | None,
    is_right: Callable[[dict, dict[str, set[str]]], bool],
) -> list[float]:
    rewards = []
    all_outcomes = outcomes(completions, environments)
    for completion, environment, outcome in zip(completions, environments or [], all_outcomes, strict=True):
        tools = {tool.__name__: set(inspect.signature(tool).parameters) for tool in tool_methods(environment)}
        calls = [call["function"] for turn in assistant_turns(completion) for call in turn.get("tool_calls") or ()]
        rewards.append(share_of_calls(sum(is_right(call, tools) for call in calls), completion, outcome))
    return rewards
