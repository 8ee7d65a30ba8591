"""Reward functions for GRPO, one family a file. A new reward is one file and one entry.

Each has TRL's signature, `reward(prompts, completions, environments=None, **columns) -> list[float]`, lies in [0, 1],
and gives the solver's play 1.0.
"""

from collections.abc import Callable, Mapping

from adamba.errors import UserError
from adamba.rewards.correctness import correctness
from adamba.rewards.efficiency import efficiency
from adamba.rewards.format import format_reward
from adamba.rewards.tool_calls import tool_argument_names, tool_argument_values, tool_name
from adamba.rewards.tool_use import tool_use

REWARDS: dict[str, Callable[..., list[float]]] = {
    "correctness": correctness,
    "format": format_reward,
    "tool_use": tool_use,
    "tool_name": tool_name,
    "tool_argument_names": tool_argument_names,
    "tool_argument_values": tool_argument_values,
    "efficiency": efficiency,
}


def select_rewards(weights: Mapping[str, float]) -> tuple[list[Callable[..., list[float]]], list[float]]:
    """Reward functions and their weights, in the order of the recipe's `rewards:`.

    Raises:
        UserError: an unknown reward, or none at all.
    """
    if not weights:
        raise UserError(f"rewards: is empty; give a weight to at least one of {', '.join(REWARDS)}")
    for name in weights:
        if name not in REWARDS:
            raise UserError(f"rewards: unknown reward {name!r}; known rewards are {', '.join(REWARDS)}")
    return [REWARDS[name] for name in weights], [float(weight) for weight in weights.values()]


__all__ = [
    "REWARDS",
    "correctness",
    "efficiency",
    "format_reward",
    "select_rewards",
    "tool_argument_names",
    "tool_argument_values",
    "tool_name",
    "tool_use",
]
