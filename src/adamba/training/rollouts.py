"""Trajectories of a checkpoint on the tasks: played, labelled, and paired for preference training."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adamba.errors import UserError
from adamba.tasks import ENVIRONMENTS, TASKS, Split, tool_schemas
from adamba.training.agent_rows import own_columns, prompt_rows
from adamba.training.play import Episode

Row = dict[str, Any]


def rollout_rows(
    mix: Mapping[str, float],
    num_prompts: int,
    num_samples: int,
    *,
    split: Split,
    seed: int,
    settings: Mapping[str, dict[str, Any]],
) -> list[Row]:
    """Each of `num_prompts` prompts `num_samples` times in a row.

    Raises:
        UserError: a source that is no task.
    """
    for name in mix:
        if name not in TASKS:
            raise UserError(f"mix: {name!r} is no task, only tasks are played; use {', '.join(TASKS)}")
    prompts = prompt_rows(mix, num_prompts, split=split, seed=seed, settings=settings)
    plain = [own_columns(row) for row in prompts]
    return [row for row in plain for _ in range(num_samples)]


def trajectory(episode: Episode, success_score: float) -> Row:
    """One episode as a row of `trajectories.jsonl`."""
    task = next(name for name, task in TASKS.items() if episode.row["environment"] in task.environments)
    score, finished = episode.outcome["score"], episode.finished and not episode.cut
    return {
        "source": task,
        "environment": episode.row["environment"],
        "seed": episode.row["seed"],
        "split": episode.row["split"],
        "messages": episode.messages,
        "tools": tool_schemas(ENVIRONMENTS[episode.row["environment"]]),
        "num_prompt_messages": len(episode.row["prompt"]),
        "success": bool(score >= success_score and episode.invalid_calls == 0 and finished),
        "score": score,
        "outcome": dict(episode.outcome),
        "valid_calls": episode.valid_calls,
        "invalid_calls": episode.invalid_calls,
        "finished": finished,
        "num_turns": episode.num_turns,
        "num_generated_tokens": episode.num_generated_tokens,
    }


def preference_pairs(trajectories: Iterable[Row]) -> list[Row]:
    """One pair `{"prompt", "chosen", "rejected", "tools", "source"}` of each prompt that was both solved and failed.

    The best trajectory is set against the worst. What both share is the prompt; the answers are the assistant's turns
    in which they part. So what is preferred is one decision, with nothing of the environment in it.
    """
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in trajectories:
        groups.setdefault((row["environment"], row["seed"]), []).append(row)
    pairs = []
    for group in groups.values():
        solved = [row for row in group if row["success"]]
        failed = [row for row in group if not row["success"]]
        if not solved or not failed:
            continue
        best = max(solved, key=lambda row: (row["score"], -row["num_generated_tokens"]))
        worst = min(failed, key=lambda row: (row["score"], -row["invalid_calls"]))
        parted = _first_difference(best["messages"], worst["messages"])
        if parted is not None:
            pairs.append(
                {
                    "prompt": best["messages"][:parted],
                    "chosen": [best["messages"][parted]],
                    "rejected": [worst["messages"][parted]],
                    "tools": best["tools"],
                    "source": best["source"],
                }
            )
    return pairs


def _first_difference(best: Sequence[Row], worst: Sequence[Row]) -> int | None:
    """Where two conversations part; None unless both have an assistant turn there."""
    for index, (ours, theirs) in enumerate(zip(best, worst, strict=False)):
        if ours != theirs:
            return index if ours["role"] == theirs["role"] == "assistant" else None
    return None


def rollout_metrics(trajectories: Sequence[Row], num_pairs: int) -> dict[str, float]:
    """`success_rate_<task>` and the counts."""
    metrics: dict[str, float] = {"num_trajectories": len(trajectories), "num_pairs": num_pairs}
    for task in dict.fromkeys(row["source"] for row in trajectories):
        successes = [row["success"] for row in trajectories if row["source"] == task]
        metrics[f"success_rate_{task}"] = sum(successes) / len(successes)
    return metrics
