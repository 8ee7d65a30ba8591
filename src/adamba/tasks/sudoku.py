"""Sudoku, 4×4 or 9×9: each turn calls `fill` with one or more cells until the grid is full.

    Sudoku: fill every 0, at most 4 cells a call.   →  fill("122 143")  →  1234 …  →  …  →  Solved.
    1034
    …

Every puzzle has exactly one solution; givens cannot be changed.
"""

import random
import re
from dataclasses import dataclass
from typing import Any

from adamba.errors import UserError
from adamba.tasks.puzzle import PuzzleEnvironment, puzzle_task
from adamba.tasks.sudoku_rules import (
    EMPTY,
    SIZES,
    candidates,
    place,
    random_puzzle,
    render,
    size_of,
    solution,
    solver_cells,
)
from adamba.tasks.task import Row, Split, draw_instance, settings_from

NAME = "sudoku"
PHRASING = "Sudoku: fill every 0, at most {} cells a call.\n{}"
CELLS = re.compile(r"[1-9]{3}(?: [1-9]{3})*")
MAX_CHARACTERS = 400


@dataclass(frozen=True)
class SudokuSettings:
    """Settings of the sudoku task.

    Attributes:
        size: 4 or 9.
        min_blanks: Empty cells, at least.
        max_blanks: Empty cells, at most (10 of 16, 50 of 81).
        cells_per_call: Most cells in one call.
    """

    size: int = 4
    min_blanks: int = 4
    max_blanks: int = 8
    cells_per_call: int = 4

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UserError(f"settings of task {NAME}: size is {self.size}; use 4 or 9")
        most = 10 if self.size == 4 else 50
        if not 1 <= self.min_blanks <= self.max_blanks <= most:
            raise UserError(
                f"settings of task {NAME}: min_blanks {self.min_blanks} and max_blanks {self.max_blanks} must satisfy "
                f"1 <= min_blanks <= max_blanks <= {most}"
            )
        if self.cells_per_call < 1:
            raise UserError(f"settings of task {NAME}: cells_per_call is {self.cells_per_call}; use 1 or more")


class SudokuEnvironment(PuzzleEnvironment):
    """One puzzle."""

    _tool = ("fill", "cells")

    def __init__(self) -> None:
        self.reset(puzzle="1234341221434321"[:-1] + EMPTY, cells_per_call=1)

    def reset(self, puzzle: str, cells_per_call: int, **row: object) -> None:
        """Start the puzzle of a `prompt` row; the prompt shows it, so nothing is added to it."""
        self._puzzle = puzzle
        self._grid = puzzle
        self._answer = solution(puzzle)
        self._cells_per_call = cells_per_call
        blanks = puzzle.count(EMPTY)
        self._begin(best_calls=-(-blanks // cells_per_call), best_work=blanks)

    def fill(self, cells: str) -> str:
        """Write digits into cells.

        Args:
            cells: Row, column and digit of each, like 123 241.
        """
        if self._done:
            return self._after_end()
        if not isinstance(cells, str) or len(cells) > MAX_CHARACTERS or not CELLS.fullmatch(cells):
            return self._refuse("Not cells.")
        parts = cells.split()
        if len(parts) > self._cells_per_call:
            return self._refuse("Too many cells.")
        size, grid, good = size_of(self._grid), self._grid, True
        for part in parts:
            if max(part) > str(size):
                return self._refuse("Not cells.")
            cell, digit = (int(part[0]) - 1) * size + int(part[1]) - 1, part[2]
            if self._puzzle[cell] != EMPTY:
                return self._refuse("A given cell.")
            if grid[cell] == digit:
                return self._refuse("It says so already.")
            if digit not in candidates(grid, cell):
                return self._refuse("Twice the same digit.")
            grid = place(grid, cell, digit)
            good = good and digit == self._answer[cell]
        self._grid = grid
        return self._accept(work=len(parts), good=good)

    def _is_solved(self) -> bool:
        return self._grid == self._answer

    def _progress(self) -> float:
        """Right digits among the blanks less wrong ones, so that guessing does not pay."""
        blanks = [cell for cell, mark in enumerate(self._puzzle) if mark == EMPTY]
        right = sum(self._grid[cell] == self._answer[cell] for cell in blanks)
        wrong = sum(self._grid[cell] not in (EMPTY, self._answer[cell]) for cell in blanks)
        return max(0, right - wrong) / len(blanks)

    def _observation(self) -> str:
        return render(self._grid)

    def _solver_argument(self) -> str:
        size = size_of(self._grid)
        wrong = [c for c, mark in enumerate(self._grid) if mark not in (EMPTY, self._answer[c])]
        cells = wrong[: self._cells_per_call] or solver_cells(self._grid, self._answer, self._cells_per_call)
        return " ".join(f"{cell // size + 1}{cell % size + 1}{self._answer[cell]}" for cell in cells)


def prompt(seed: int, split: Split, **settings: object) -> Row:
    """One puzzle, for RL and evaluation. The split is that of its solution: no solved grid is in both."""
    config = settings_from(SudokuSettings, NAME, settings)
    puzzle, _ = draw_instance(NAME, seed, split, lambda rng: _draw(rng, config), solution)
    return {
        "prompt": [{"role": "user", "content": PHRASING.format(config.cells_per_call, render(puzzle))}],
        "environment": NAME,
        "seed": seed,
        "split": split,
        "puzzle": puzzle,
        "cells_per_call": config.cells_per_call,
    }


def _draw(rng: random.Random, config: SudokuSettings) -> str | None:
    return random_puzzle(rng, config.size, rng.randint(config.min_blanks, config.max_blanks))


def _worse_cells(environment: Any, rng: random.Random) -> str:
    """The solver's cells with one wrong digit."""
    parts = environment._solver_argument().split()
    index = rng.randrange(len(parts))
    digits = "123456789"[: size_of(environment._grid)].replace(parts[index][2], "")
    parts[index] = parts[index][:2] + rng.choice(digits)
    return " ".join(parts)


SUDOKU = puzzle_task(NAME, SudokuEnvironment, prompt, _worse_cells)
