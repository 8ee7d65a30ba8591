"""Sokoban: push every box onto a goal; each turn calls `move` with one or more steps.

    Sokoban: push every $ onto a . , at most 4 moves a call.   →  move("RRD")  →  ###### …  →  …  →  Solved.
    ######
    …

Boards are solvable by construction and the solver's play has the fewest moves; it is always the same in a position.
"""

import random
from dataclasses import dataclass
from typing import Any

from adamba.errors import UserError
from adamba.tasks.puzzle import PuzzleEnvironment, puzzle_task
from adamba.tasks.sokoban_rules import DIRECTIONS, boxes_home, is_solved, num_boxes, play, random_board, solve
from adamba.tasks.task import Row, Split, draw_instance, settings_from

NAME = "sokoban"
PHRASING = "Sokoban: push every $ onto a . , at most {} moves a call.\n{}"


@dataclass(frozen=True)
class SokobanSettings:
    """Settings of the sokoban task.

    Attributes:
        size: Cells in a row and in a column, the wall around included (5 to 10).
        boxes: Number of boxes (1 to 4).
        wall_ratio: Probability that an inner cell is a wall.
        min_moves: Length of the shortest solution, at least.
        max_moves: Length of the shortest solution, at most.
        moves_per_call: Most moves in one call.
    """

    size: int = 6
    boxes: int = 1
    wall_ratio: float = 0.1
    min_moves: int = 2
    max_moves: int = 16
    moves_per_call: int = 4

    def __post_init__(self) -> None:
        if not 5 <= self.size <= 10:
            raise UserError(f"settings of task {NAME}: size is {self.size}; use 5 to 10")
        if not 1 <= self.boxes <= 4:
            raise UserError(f"settings of task {NAME}: boxes is {self.boxes}; use 1 to 4")
        if not 1 <= self.min_moves <= self.max_moves:
            raise UserError(
                f"settings of task {NAME}: min_moves {self.min_moves} and max_moves {self.max_moves} must satisfy "
                "1 <= min_moves <= max_moves"
            )
        if self.moves_per_call < 1:
            raise UserError(f"settings of task {NAME}: moves_per_call is {self.moves_per_call}; use 1 or more")


class SokobanEnvironment(PuzzleEnvironment):
    """One board."""

    _tool = ("move", "moves")

    def __init__(self) -> None:
        self.reset(board="#####\n#@$.#\n#####", best_moves=1, moves_per_call=1)

    def reset(self, board: str, best_moves: int, moves_per_call: int, **row: object) -> None:
        """Start the board of a `prompt` row; the prompt shows it, so nothing is added to it."""
        self._board = board
        self._moves_per_call = moves_per_call
        self._trail: list[tuple[str, str, int]] = []
        self._begin(best_calls=-(-best_moves // moves_per_call), best_work=best_moves)

    def move(self, moves: str) -> str:
        """Walk and push boxes.

        Args:
            moves: Letters U, D, L, R, like RRD.
        """
        if self._done:
            return self._after_end()
        if not isinstance(moves, str) or not moves or set(moves) - set(DIRECTIONS):
            return self._refuse("Not moves.")
        if len(moves) > self._moves_per_call:
            return self._refuse("Too many moves.")
        after = play(self._board, moves)
        if after is None:
            return self._refuse("Blocked.")
        self._trail.append((self._board, after, len(moves)))
        self._board = after
        return self._accept(work=len(moves), good=False)  # known at the end: it takes a search

    def _count_good(self) -> int:
        """Calls each of whose moves was one of a shortest solution from where it began."""
        return sum(_is_good(*call) for call in self._trail)

    def _is_solved(self) -> bool:
        return is_solved(self._board)

    def _progress(self) -> float:
        return boxes_home(self._board) / num_boxes(self._board)

    def _observation(self) -> str:
        return self._board

    def _solver_argument(self) -> str:
        return (solve(self._board) or "")[: self._moves_per_call]


def _is_good(before: str, after: str, num_moves: int) -> bool:
    best = solve(before)
    return best is not None and num_moves <= len(best) and solve(after, len(best) - num_moves) is not None


def prompt(seed: int, split: Split, **settings: object) -> Row:
    """One board, for RL and evaluation."""
    config = settings_from(SokobanSettings, NAME, settings)
    board, _ = draw_instance(NAME, seed, split, lambda rng: _draw(rng, config), str)
    return {
        "prompt": [{"role": "user", "content": PHRASING.format(config.moves_per_call, board)}],
        "environment": NAME,
        "seed": seed,
        "split": split,
        "board": board,
        "best_moves": len(solve(board) or ""),
        "moves_per_call": config.moves_per_call,
    }


def _draw(rng: random.Random, config: SokobanSettings) -> str | None:
    board = random_board(rng, config.size, config.boxes, config.wall_ratio, pulls=rng.randint(4, 12 * config.size))
    if board is None:
        return None
    solution = solve(board)
    return board if solution is not None and config.min_moves <= len(solution) <= config.max_moves else None


def _worse_moves(environment: Any, rng: random.Random) -> str:
    """As many moves as the solver makes here, after which it is farther from solved, if ever."""
    best, board = environment._solver_argument(), environment._board
    left = len(solve(board) or "") - len(best)
    while True:
        moves = "".join(rng.choice(DIRECTIONS) for _ in best)
        after = play(board, moves)
        if after is None or solve(after, left) is None:
            return moves


SOKOBAN = puzzle_task(NAME, SokobanEnvironment, prompt, _worse_moves)
