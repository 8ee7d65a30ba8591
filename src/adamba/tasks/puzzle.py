"""What the one-player puzzles share: each call changes a board until it is solved or the calls are used up.

Everything of an episode is plain data in the environment, so a copy of it (`copy.deepcopy`) is the same state again:
several candidates, or several roles, can act from it. `_observation` is the state as any of them reads it.
"""

import random
from collections.abc import Callable
from typing import Any

from adamba.errors import UserError
from adamba.tasks.task import Message, Row, tool_call

MAX_ILLEGAL_CALLS = 3
ILLEGAL_CALL_PENALTY = 0.1
MAX_PROGRESS_CREDIT = 0.2  # an unsolved puzzle scores at most this
SOLVED, NOT_SOLVED = "Solved.", "Not solved."


class PuzzleEnvironment:
    """Accounting of an episode. A puzzle adds `reset`, one tool, and the four methods below that raise."""

    def _begin(self, best_calls: int, best_work: int) -> None:
        """Start counting; the solver needs `best_calls` calls and, in them, `best_work` moves or cells."""
        self._best_calls = best_calls
        self._best_work = best_work
        self._max_calls = 2 * best_calls + 2
        self._work = 0
        self._valid_calls = 0
        self._good_calls = 0
        self._illegal_calls = 0
        self._calls_after_end = 0

    def _is_solved(self) -> bool:
        raise NotImplementedError

    def _progress(self) -> float:
        """Share of the way done, 0 to 1: a function of the board alone, so that going in circles earns nothing."""
        raise NotImplementedError

    def _observation(self) -> str:
        """The board as text."""
        raise NotImplementedError

    def _solver_argument(self) -> str:
        """What the solver calls the tool with, always the same on the same board."""
        raise NotImplementedError

    @property
    def _done(self) -> bool:
        return self._is_solved() or self._illegal_calls >= MAX_ILLEGAL_CALLS or self._valid_calls >= self._max_calls

    def _accept(self, work: int, good: bool) -> str:
        """Count a call that changed the board (already changed) and describe it."""
        self._work += work
        self._valid_calls += 1
        self._good_calls += good
        text = self._observation()
        return f"{text}\n{self._result_text()}" if self._done else text

    def _refuse(self, reason: str) -> str:
        """Count a call that changed nothing and say why."""
        self._illegal_calls += 1
        return f"{reason} {NOT_SOLVED}" if self._done else f"{reason}\n{self._observation()}"

    def _after_end(self) -> str:
        """Count a call that came too late."""
        self._calls_after_end += 1
        return f"It is over. {self._result_text()}"

    def _result_text(self) -> str:
        return SOLVED if self._is_solved() else NOT_SOLVED

    def _count_good(self) -> int:
        """Calls that came as near as a call can."""
        return self._good_calls

    def _score(self) -> float:
        """1 for the solver's play; a solution with more work than the best is worth between 0.5 and 1."""
        if self._is_solved():
            score = 0.5 + 0.5 * min(1.0, self._best_work / max(1, self._work))
        else:
            score = MAX_PROGRESS_CREDIT * self._progress()
        return max(0.0, score - ILLEGAL_CALL_PENALTY * self._illegal_calls)

    def _outcome(self, final_text: str = "") -> dict[str, float]:
        """Score the episode; the board alone decides `score`, the assistant's last text only `well_formed`."""
        return {
            "score": self._score(),
            "well_formed": float(self._done and final_text.strip() == self._result_text()),
            "solved": float(self._is_solved()),
            "progress": self._progress(),
            "valid_calls": float(self._valid_calls),
            "invalid_calls": float(self._illegal_calls + self._calls_after_end),
            "good_calls": float(self._count_good()),
            "best_calls": float(self._best_calls),
        }


def solved_messages(environment: PuzzleEnvironment, tool: str, argument: str, row: Row) -> list[Message]:
    """The whole conversation as the solver holds it."""
    environment.reset(**row)  # type: ignore[attr-defined]
    messages: list[Message] = list(row["prompt"])
    while not environment._done:
        value = environment._solver_argument()
        answer = getattr(environment, tool)(**{argument: value})
        messages += [tool_call(tool, **{argument: value}), {"role": "tool", "name": tool, "content": answer}]
    return [*messages, {"role": "assistant", "content": environment._result_text()}]


def preference_pair(
    environment: PuzzleEnvironment,
    tool: str,
    argument: str,
    row: Row,
    rng: random.Random,
    worse: Callable[[Any, random.Random], str | None],
    task: str,
) -> Row:
    """The solver's call against a worse one, `{"prompt", "chosen", "rejected"}`, at a random turn of its play.

    Raises:
        UserError: `worse` knows none at any turn.
    """
    environment.reset(**row)  # type: ignore[attr-defined]
    messages: list[Message] = list(row["prompt"])
    pairs = []
    while not environment._done:
        best, rejected = environment._solver_argument(), worse(environment, rng)
        if rejected is not None:
            pairs.append(
                (list(messages), tool_call(tool, **{argument: best}), tool_call(tool, **{argument: rejected}))
            )
        answer = getattr(environment, tool)(**{argument: best})
        messages += [tool_call(tool, **{argument: best}), {"role": "tool", "name": tool, "content": answer}]
    if not pairs:
        raise UserError(
            f"settings of task {task}: a game without any worse call than the solver's; widen the settings"
        )
    history, chosen, rejected_call = rng.choice(pairs)
    return {"prompt": history, "chosen": [chosen], "rejected": [rejected_call]}
