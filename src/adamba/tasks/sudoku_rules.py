"""Sudoku as pure functions, 4×4 and 9×9: generation with exactly one solution, an exact solver, one step of it.

A grid is its digits row by row, 0 where a cell is empty: each cell is one token, where dots would be joined.
"""

import random
from functools import lru_cache

SIZES = (4, 9)
EMPTY = "0"


def size_of(grid: str) -> int:
    """Cells in a row: 4 or 9."""
    return 4 if len(grid) == 16 else 9


@lru_cache
def peers(size: int) -> tuple[tuple[int, ...], ...]:
    """For each cell, the cells that may not hold the same digit: those of its row, column and box."""
    box = int(size**0.5)
    cells = [(row, column) for row in range(size) for column in range(size)]

    def together(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] == b[0] or a[1] == b[1] or (a[0] // box == b[0] // box and a[1] // box == b[1] // box)

    return tuple(
        tuple(index for index, other in enumerate(cells) if other != cell and together(cell, other)) for cell in cells
    )


def candidates(grid: str, cell: int) -> str:
    """Digits that `cell` may hold, as far as its peers say."""
    size = size_of(grid)
    taken = {grid[peer] for peer in peers(size)[cell]}
    return "".join(digit for digit in "123456789"[:size] if digit not in taken)


def place(grid: str, cell: int, digit: str) -> str:
    """The grid with `digit` in `cell`."""
    return grid[:cell] + digit + grid[cell + 1 :]


def most_constrained(grid: str) -> tuple[int, str]:
    """The first empty cell with the fewest candidates, and these."""
    best, digits = -1, "0123456789"
    for cell, mark in enumerate(grid):
        if mark == EMPTY:
            found = candidates(grid, cell)
            if len(found) < len(digits):
                best, digits = cell, found
                if len(found) <= 1:
                    break
    return best, digits


def solutions(grid: str, limit: int, rng: random.Random | None = None) -> list[str]:
    """Up to `limit` solutions, in the order of the digits, or in random order with `rng`."""
    if EMPTY not in grid:
        return [grid]
    cell, digits = most_constrained(grid)
    order = rng.sample(digits, len(digits)) if rng else digits
    found: list[str] = []
    for digit in order:
        found += solutions(place(grid, cell, digit), limit - len(found), rng)
        if len(found) >= limit:
            break
    return found


@lru_cache(maxsize=4096)
def solution(grid: str) -> str:
    """The solution.

    Raises:
        ValueError: there is none.
    """
    found = solutions(grid, 1)
    if not found:
        raise ValueError(f"{grid} has no solution")
    return found[0]


def random_puzzle(rng: random.Random, size: int, num_blanks: int) -> str | None:
    """A grid with `num_blanks` empty cells and exactly one solution; None when this draw cannot be emptied so far."""
    grid = solutions(EMPTY * size * size, 1, rng)[0]
    blanks = 0
    for cell in rng.sample(range(size * size), size * size):
        if blanks == num_blanks:
            break
        emptied = place(grid, cell, EMPTY)
        if len(solutions(emptied, 2)) == 1:
            grid, blanks = emptied, blanks + 1
    return grid if blanks == num_blanks else None


def solver_cells(grid: str, answer: str, max_cells: int) -> list[int]:
    """The next cells that the solver fills, always the same ones: each the first that has a single candidate left
    (the first empty one where there is none), so that what to write can be seen from its row, column and box.
    """
    cells: list[int] = []
    while EMPTY in grid and len(cells) < max_cells:
        cell, digits = most_constrained(grid)
        if len(digits) > 1:
            cell = grid.index(EMPTY)
        cells.append(cell)
        grid = place(grid, cell, answer[cell])
    return cells


def render(grid: str) -> str:
    """Rows below each other."""
    size = size_of(grid)
    return "\n".join(grid[start : start + size] for start in range(0, len(grid), size))
