"""What every reward reads: the messages of a completion and the outcome its environment reports."""

from collections.abc import Sequence
from typing import Any

Completion = list[dict[str, Any]]


def outcomes(completions: Sequence[Completion], environments: Sequence[Any] | None) -> list[dict[str, float]]:
    """Outcome of each episode, judged with the text of its last turn.

    Raises:
        ValueError: there are no environments to ask.
    """
    if environments is None:
        raise ValueError("rewards: the episodes have no environments; train with `environment_factory`")
    return [
        environment._outcome(final_text(completion))
        for completion, environment in zip(completions, environments, strict=True)
    ]


def assistant_turns(completion: Completion) -> list[dict[str, Any]]:
    """The model's own messages."""
    return [message for message in completion if message["role"] == "assistant"]


def final_text(completion: Completion) -> str:
    """Text of the last message when it is the model's and calls no tool, else nothing: an unfinished episode."""
    last = completion[-1] if completion else {}
    if last.get("role") != "assistant" or last.get("tool_calls"):
        return ""
    return last.get("content") or ""


def num_calls(completion: Completion) -> int:
    """Tool calls of an episode, those that could not be read as calls included."""
    turns = assistant_turns(completion)
    return sum(len(turn.get("tool_calls") or ()) + (turn.get("content") or "").count("<tool_call>") for turn in turns)


def share_of_calls(right: float, completion: Completion, outcome: dict[str, float]) -> float:
    """`right` calls, no more than the solver needs, out of all calls made or needed."""
    needed = outcome["best_calls"]
    made = max(num_calls(completion), outcome["valid_calls"] + outcome["invalid_calls"])
    all_calls = max(made, needed)
    return min(right, needed) / all_calls if all_calls else 1.0
