"""Sokoban as pure functions: moves, generation by pulling boxes away from their goals, an exact solver.

A board is rows of equal length joined by line breaks, in the usual signs: `#` wall, `-` floor, `.` goal, `$` box, `*`
box on a goal, `@` player, `+` player on a goal. A wall runs around it. Positions are indices into that text.
"""

import heapq
import random
from collections import deque
from functools import lru_cache

DIRECTIONS = "UDLR"
LEAVE = {"@": "-", "+": ".", "$": "-", "*": "."}  # what is left where a player or a box was
ENTER_PLAYER = {"-": "@", ".": "+", "$": "@", "*": "+"}
ENTER_BOX = {"-": "$", ".": "*"}
UNREACHABLE = 10**6
MAX_STATES = 200_000  # of a search; a board that needs more is not used


def steps_of(board: str) -> dict[str, int]:
    """By how much each move changes a position."""
    width = board.index("\n") + 1
    return {"U": -width, "D": width, "L": -1, "R": 1}


def player_of(board: str) -> int:
    """Where the player is."""
    found = board.find("@")
    return found if found >= 0 else board.index("+")


def play(board: str, moves: str) -> str | None:
    """The board after `moves`; None when one of them goes into a wall, pushes a box that is blocked, or is no move."""
    steps = steps_of(board)
    marks, player = list(board), player_of(board)
    for move in moves:
        if move not in steps:
            return None
        ahead = player + steps[move]
        mark = marks[ahead]
        if mark == "#":
            return None
        if mark in "$*":
            beyond = ahead + steps[move]
            if marks[beyond] not in ENTER_BOX:
                return None
            marks[beyond] = ENTER_BOX[marks[beyond]]
        marks[ahead] = ENTER_PLAYER[mark]
        marks[player] = LEAVE[marks[player]]
        player = ahead
    return "".join(marks)


def is_solved(board: str) -> bool:
    """Whether every box is on a goal."""
    return "$" not in board


@lru_cache(maxsize=4096)
def solve(board: str, at_most: int = UNREACHABLE) -> str | None:
    """A solution with the fewest moves, always the same one for a board; None when there is none of `at_most` moves.

    A* over player and boxes; a box is at least as far as its pushes to the nearest goal on an empty board.
    """
    steps = [steps_of(board)[move] for move in DIRECTIONS]
    start = (player_of(board), frozenset(index for index, mark in enumerate(board) if mark in "$*"))
    goals = frozenset(index for index, mark in enumerate(board) if mark in ".*+")
    walls = frozenset(index for index, mark in enumerate(board) if mark in "#\n")
    pushes = _pushes_to_goal(board)

    def bound(boxes: frozenset[int]) -> int:
        return sum(pushes.get(box, UNREACHABLE) for box in boxes)

    best = {start: 0}
    queue = [(bound(start[1]), "", start)]
    while queue and len(best) <= MAX_STATES:
        _, moves, (player, boxes) = heapq.heappop(queue)
        if boxes <= goals:
            return moves
        if best[player, boxes] < len(moves):
            continue
        for move, step in zip(DIRECTIONS, steps, strict=True):
            ahead, moved = player + step, boxes
            if ahead in walls:
                continue
            if ahead in boxes:
                beyond = ahead + step
                if beyond in walls or beyond in boxes:
                    continue
                moved = boxes - {ahead} | {beyond}
            state, length = (ahead, moved), len(moves) + 1
            at_least = length + bound(moved)
            if at_least <= at_most and at_least < UNREACHABLE and length < best.get(state, UNREACHABLE):
                best[state] = length
                heapq.heappush(queue, (at_least, moves + move, state))
    return None


@lru_cache(maxsize=1024)
def _pushes_to_goal(board: str) -> dict[int, int]:
    """Pushes from each cell to the nearest goal with no other box about; cells from which none is reached lack."""
    bare = "".join("#" if mark in "#\n" else mark for mark in board)
    found = {index: 0 for index, mark in enumerate(board) if mark in ".*+"}
    queue = deque(found)
    while queue:
        cell = queue.popleft()
        for step in steps_of(board).values():
            # Backwards: the box came from `cell - step`, the player stood one further.
            before, player = cell - step, cell - 2 * step
            if 0 <= player < len(bare) and before not in found and bare[before] != "#" and bare[player] != "#":
                found[before] = found[cell] + 1
                queue.append(before)
    return found


def boxes_home(board: str) -> int:
    """Boxes on goals."""
    return board.count("*")


def num_boxes(board: str) -> int:
    """All boxes."""
    return board.count("*") + board.count("$")


def random_board(rng: random.Random, size: int, boxes: int, wall_ratio: float, pulls: int) -> str | None:
    """A solvable board: from a solved one, the player walks at random and pulls boxes along, `pulls` steps back.

    None when there is no room for it, or a box is still on a goal.
    """
    inner = [row * (size + 1) + column for row in range(1, size - 1) for column in range(1, size - 1)]
    marks = list("\n".join("#" * size for _ in range(size)))
    floor = [cell for cell in inner if rng.random() >= wall_ratio]
    if len(floor) < 2 * boxes + 1:
        return None
    goals = rng.sample(floor, boxes)
    player = rng.choice([cell for cell in floor if cell not in goals])
    where, free = set(goals), set(floor)
    steps = [-(size + 1), size + 1, -1, 1]
    for _ in range(pulls):
        step = rng.choice(steps)
        to, behind = player + step, player - step
        if to not in free or to in where:
            continue
        if behind in where and rng.random() < 0.8:
            where = where - {behind} | {player}
        player = to
    if where & set(goals):
        return None
    for cell in floor:
        marks[cell] = "." if cell in goals else "-"
    for cell in where:
        marks[cell] = "$"
    marks[player] = "+" if player in goals else "@"
    return "".join(marks)
