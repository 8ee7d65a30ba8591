"""What the one-player puzzles share: each call changes a board until it is solved or the calls are used up.

Everything of an episode is plain data in the environment, so a copy of it (`copy.deepcopy`) is the same state again:
several candidates, or several roles, can act from it. `_observation` is the state as any of them reads it.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from adamba.errors import UserError
from adamba.tasks.roles import DEFAULT_ROLES, role_example, select_roles
from adamba.tasks.task import Message, Row, Split, Task, settings_from, tool_call, tool_schemas

MAX_ILLEGAL_CALLS = 3
ILLEGAL_CALL_PENALTY = 0.1
MAX_PROGRESS_CREDIT = 0.2  # an unsolved puzzle scores at most this
SOLVED, NOT_SOLVED = "Solved.", "Not solved."


@dataclass(frozen=True)
class ShownRoles:
    """Settings of a puzzle's examples alone: the roles that some show, and how many do."""

    roles: Any = DEFAULT_ROLES
    role_fraction: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.role_fraction <= 1:
            raise UserError(f"role_fraction: {self.role_fraction} must be between 0 and 1")


class PuzzleEnvironment(ABC):
    """Accounting of an episode. A puzzle adds `_tool`, its one tool with one argument, and the abstract methods."""

    _tool: ClassVar[tuple[str, str]]  # its name and its argument's
    reset: Callable[..., None]

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

    @abstractmethod
    def _is_solved(self) -> bool: ...

    @abstractmethod
    def _progress(self) -> float:
        """Share of the way done, 0 to 1: a function of the board alone, so that going in circles earns nothing."""

    @abstractmethod
    def _observation(self) -> str:
        """The board as text."""

    @abstractmethod
    def _solver_argument(self) -> str:
        """What the solver calls the tool with, always the same on the same board."""

    def _call(self, value: str) -> Message:
        name, argument = self._tool
        return tool_call(name, **{argument: value})

    def _solver_turn(self) -> list[Message]:
        """Play the solver's call: the call and the tool's answer."""
        name, argument = self._tool
        value = self._solver_argument()
        answer = getattr(self, name)(**{argument: value})
        return [self._call(value), {"role": "tool", "name": name, "content": answer}]

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


def puzzle_task(
    name: str,
    environment_class: type[PuzzleEnvironment],
    prompt: Callable[..., Row],
    worse: Callable[[Any, random.Random], str],
) -> Task:
    """The task of a puzzle.

    Args:
        worse: An argument that serves worse than the solver's, from the environment as it stands.
    """

    def example(seed: int, split: Split, **settings: object) -> Row:
        """One puzzle as the solver plays it; or, with `roles` in the settings, for `role_fraction` of the examples one
        turn of one of these roles."""
        given: dict[str, Any] = {key: settings.pop(key) for key in ("roles", "role_fraction") if key in settings}
        shown = settings_from(ShownRoles, name, given)
        roles = select_roles(shown.roles, environment_class)
        row = prompt(seed, split, **settings)
        environment = environment_class()
        environment.reset(**row)
        if random.Random(f"{name}/kind/{split}/{seed}").random() < shown.role_fraction:
            return role_example(environment, roles, worse, name, seed, split)
        messages: list[Message] = list(row["prompt"])
        while not environment._done:
            messages += environment._solver_turn()
        messages.append({"role": "assistant", "content": environment._result_text()})
        return {"messages": messages, "tools": tool_schemas(environment_class)}

    def preference(seed: int, split: Split, **settings: object) -> Row:
        """The solver's call against a worse one, at a random turn of its play."""
        row = prompt(seed, split, **settings)
        rng = random.Random(f"{name}/preference/{split}/{seed}")
        environment = environment_class()
        environment.reset(**row)
        messages: list[Message] = list(row["prompt"])
        pairs = []
        while not environment._done:
            rejected = environment._call(worse(environment, rng))
            history = list(messages)
            messages += environment._solver_turn()
            pairs.append((history, messages[-2], rejected))
        history, chosen, rejected = rng.choice(pairs)
        return {
            "prompt": history,
            "chosen": [chosen],
            "rejected": [rejected],
            "tools": tool_schemas(environment_class),
        }

    return Task(name, {name: environment_class}, example, prompt, preference)
