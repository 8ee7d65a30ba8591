"""A walk on a square grid as pure functions: moves, distances by breadth-first search, the solver's walk.

A grid is rows of equal length joined by line breaks: `@` the walker, `G` the goal, `#` blocks, `.` free cells; `*` is
the walker on the goal. Positions are indices into that text.
"""

import random
from collections import deque
from functools import lru_cache

DIRECTIONS = "UDLR"  # also the order in which the solver prefers moves that are equally good
WALKER, GOAL, BLOCK, FREE, ARRIVED = "@", "G", "#", ".", "*"


def steps_of(grid: str) -> dict[str, int]:
    """By how much each move changes the position."""
    width = (grid + "\n").index("\n") + 1
    return {"U": -width, "D": width, "L": -1, "R": 1}


def position_of(grid: str) -> int:
    """Where the walker is."""
    found = grid.find(WALKER)
    return found if found >= 0 else grid.index(ARRIVED)


def goal_of(grid: str) -> int:
    """Where the goal is."""
    found = grid.find(GOAL)
    return found if found >= 0 else grid.index(ARRIVED)


def is_free(grid: str, position: int) -> bool:
    """Whether one can stand there: on the grid and not a block."""
    return 0 <= position < len(grid) and grid[position] not in (BLOCK, "\n")


def walk(grid: str, start: int, moves: str) -> int | None:
    """Where `moves` lead from `start`; None when one of them leaves the grid, hits a block, or is no move."""
    steps = steps_of(grid)
    position = start
    for move in moves:
        if move not in steps:
            return None
        position += steps[move]
        if not is_free(grid, position):
            return None
    return position


@lru_cache(maxsize=1024)
def distances(grid: str, goal: int) -> dict[int, int]:
    """Steps to `goal` from every position that can reach it (breadth-first search)."""
    found = {goal: 0}
    queue = deque([goal])
    while queue:
        position = queue.popleft()
        for step in steps_of(grid).values():
            following = position + step
            if following not in found and is_free(grid, following):
                found[following] = found[position] + 1
                queue.append(following)
    return found


def solver_walk(grid: str, start: int, goal: int, max_moves: int) -> str:
    """The first `max_moves` moves of the one shortest walk that the solver takes: the first by `DIRECTIONS`."""
    away, steps = distances(grid, goal), steps_of(grid)
    moves, position = "", start
    while position != goal and len(moves) < max_moves:
        move = next(name for name in DIRECTIONS if away.get(position + steps[name], 10**9) < away[position])
        moves += move
        position += steps[move]
    return moves


def show(grid: str, position: int, goal: int) -> str:
    """The grid with the walker at `position`; `grid` without walker and goal."""
    marks = list(grid)
    marks[goal] = GOAL
    marks[position] = ARRIVED if position == goal else WALKER
    return "".join(marks)


def drawn(grid: str) -> str:
    """The grid as it is read, a space before each cell: a tokenizer joins cells that touch, two here and three there,
    so that no column would keep its place.
    """
    return "\n".join("".join(f" {cell}" for cell in row) for row in grid.split("\n"))


def bare(grid: str) -> str:
    """The grid without walker and goal."""
    return grid.replace(WALKER, FREE).replace(GOAL, FREE).replace(ARRIVED, FREE)


def random_grid(rng: random.Random, size: int, block_ratio: float) -> tuple[str, int, int]:
    """A bare grid in which each cell is a block with probability `block_ratio`, and two free cells: start and goal.

    The two may be out of reach of each other.
    """
    rows = ("".join(BLOCK if rng.random() < block_ratio else FREE for _ in range(size)) for _ in range(size))
    marks = list("\n".join(rows))
    start, goal = rng.sample([index for index, mark in enumerate(marks) if mark != "\n"], 2)
    marks[start] = marks[goal] = FREE
    return "".join(marks), start, goal
