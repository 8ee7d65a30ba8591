"""Plan path: find the way through a grid with blocks; each turn calls `move` with one or more steps.

    Path: take @ to G, at most 4 moves a call.   →  move("RRDD")  →   . . # . …  →  …  →  Solved.
     @ . # .
     …

The solver walks the shortest way, always the same one in a position.
"""

import random
from dataclasses import dataclass
from typing import Any

from adamba.errors import UserError
from adamba.tasks.plan_path_rules import (
    DIRECTIONS,
    bare,
    distances,
    drawn,
    goal_of,
    position_of,
    random_grid,
    show,
    solver_walk,
    walk,
)
from adamba.tasks.puzzle import PuzzleEnvironment, puzzle_task
from adamba.tasks.task import Row, Split, draw_instance, settings_from

NAME = "plan_path"
PHRASING = "Path: take @ to G, at most {} moves a call.\n{}"


@dataclass(frozen=True)
class PlanPathSettings:
    """Settings of the plan-path task.

    Attributes:
        size: Cells in a row and in a column (2 to 20).
        block_ratio: Probability that a cell is a block.
        min_steps: Length of the shortest way, at least.
        max_steps: Length of the shortest way, at most.
        moves_per_call: Most moves in one call.
    """

    size: int = 5
    block_ratio: float = 0.25
    min_steps: int = 2
    max_steps: int = 16
    moves_per_call: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.size <= 20:
            raise UserError(f"settings of task {NAME}: size is {self.size}; use 2 to 20")
        if not 0 <= self.block_ratio < 1:
            raise UserError(f"settings of task {NAME}: block_ratio is {self.block_ratio}; use 0 up to below 1")
        if not 1 <= self.min_steps <= self.max_steps:
            raise UserError(
                f"settings of task {NAME}: min_steps {self.min_steps} and max_steps {self.max_steps} must satisfy "
                "1 <= min_steps <= max_steps"
            )
        if self.moves_per_call < 1:
            raise UserError(f"settings of task {NAME}: moves_per_call is {self.moves_per_call}; use 1 or more")


class PlanPathEnvironment(PuzzleEnvironment):
    """One walk."""

    _tool = ("move", "moves")

    def __init__(self) -> None:
        self.reset(grid="@G", moves_per_call=1)

    def reset(self, grid: str, moves_per_call: int, **row: object) -> None:
        """Start the walk of a `prompt` row; the prompt shows the grid, so nothing is added to it."""
        self._grid = bare(grid)
        self._position = position_of(grid)
        self._goal = goal_of(grid)
        self._moves_per_call = moves_per_call
        self._distances = distances(self._grid, self._goal)
        steps = self._distances[self._position]
        self._begin(best_calls=-(-steps // moves_per_call), best_work=steps)

    def move(self, moves: str) -> str:
        """Walk on the grid.

        Args:
            moves: Letters U, D, L, R, like RRD.
        """
        if self._done:
            return self._after_end()
        if not isinstance(moves, str) or not moves or set(moves) - set(DIRECTIONS):
            return self._refuse("Not moves.")
        if len(moves) > self._moves_per_call:
            return self._refuse("Too many moves.")
        after = walk(self._grid, self._position, moves)
        if after is None:
            return self._refuse("Blocked.")
        good = self._distances[self._position] - self._distances[after] == len(moves)
        self._position = after
        return self._accept(work=len(moves), good=good)

    def _is_solved(self) -> bool:
        return self._position == self._goal

    def _progress(self) -> float:
        return max(0.0, 1.0 - self._distances[self._position] / max(1, self._best_work))

    def _observation(self) -> str:
        return drawn(show(self._grid, self._position, self._goal))

    def _solver_argument(self) -> str:
        return solver_walk(self._grid, self._position, self._goal, self._moves_per_call)


def prompt(seed: int, split: Split, **settings: object) -> Row:
    """One grid, for RL and evaluation."""
    config = settings_from(PlanPathSettings, NAME, settings)
    grid, _ = draw_instance(NAME, seed, split, lambda rng: _draw(rng, config), str)
    return {
        "prompt": [{"role": "user", "content": PHRASING.format(config.moves_per_call, drawn(grid))}],
        "environment": NAME,
        "seed": seed,
        "split": split,
        "grid": grid,
        "moves_per_call": config.moves_per_call,
    }


def _draw(rng: random.Random, config: PlanPathSettings) -> str | None:
    grid, start, goal = random_grid(rng, config.size, config.block_ratio)
    steps = distances(grid, goal).get(start, 0)
    return show(grid, start, goal) if config.min_steps <= steps <= config.max_steps else None


def _worse_moves(environment: Any, rng: random.Random) -> str:
    """As many moves as the solver makes here that do not come as near."""
    best = environment._solver_argument()
    while True:
        moves = "".join(rng.choice(DIRECTIONS) for _ in best)
        after = walk(environment._grid, environment._position, moves)
        if after is None or environment._distances[after] > environment._distances[environment._position] - len(best):
            return moves


PLAN_PATH = puzzle_task(NAME, PlanPathEnvironment, prompt, _worse_moves)
