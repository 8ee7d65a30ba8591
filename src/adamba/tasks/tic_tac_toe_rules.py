"""Tic-tac-toe as pure functions: rules, exact minimax, opponents of any strength.

A board is a string of nine cells, row by row, each `X`, `O` or `.`; cells are numbered 1 to 9. X begins, so the board
alone says whose turn it is.
"""

import random
from functools import cache
from typing import Literal

Mark = Literal["X", "O"]

EMPTY = "." * 9
# Centre, corners, edges: the order in which the solver prefers cells that are equally good.
PREFERENCE = (5, 1, 3, 7, 9, 2, 4, 6, 8)
LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))


def to_move(board: str) -> Mark:
    """Whose turn it is."""
    return "X" if board.count("X") == board.count("O") else "O"


def legal_moves(board: str) -> list[int]:
    """The free cells (1 to 9) of a game that is not over, else none."""
    return [] if is_over(board) else [cell for cell in range(1, 10) if board[cell - 1] == "."]


def place(board: str, cell: int) -> str:
    """The board after the side to move takes `cell`.

    Raises:
        ValueError: the cell is taken or not on the board, or the game is over.
    """
    if cell not in legal_moves(board):
        raise ValueError(f"cell {cell} is not a legal move on {board}")
    return board[: cell - 1] + to_move(board) + board[cell:]


@cache
def winner(board: str) -> Mark | None:
    """The side with three in a row, if any."""
    for a, b, c in LINES:
        if board[a] != "." and board[a] == board[b] == board[c]:
            return "X" if board[a] == "X" else "O"
    return None


def is_over(board: str) -> bool:
    """Whether somebody has won or no cell is free."""
    return winner(board) is not None or "." not in board


@cache
def minimax(board: str) -> int:
    """Exact value for the side to move under best play: positive wins, 0 draws, negative loses.

    The magnitude is 1 plus the number of cells left at the end, so that a win is sought soon and a loss put off.
    """
    if winner(board) is not None:
        return -1 - board.count(".")
    return max((-minimax(place(board, cell)) for cell in legal_moves(board)), default=0)


def result_under_best_play(board: str) -> int:
    """1, 0 or -1: what the side to move gets when both sides play best."""
    score = minimax(board)
    return (score > 0) - (score < 0)


def best_moves(board: str) -> list[int]:
    """All moves of the highest minimax value."""
    return [cell for cell in legal_moves(board) if -minimax(place(board, cell)) == minimax(board)]


def solver_move(board: str) -> int:
    """The one best move that the solver makes here: the first in `PREFERENCE`.

    Always the same move, because a student copies a function of the board with far fewer examples than a
    distribution over equally good moves.
    """
    return min(best_moves(board), key=PREFERENCE.index)


def safe_moves(board: str) -> list[int]:
    """All moves that keep the result under best play, however late it comes."""
    result = result_under_best_play(board)
    return [cell for cell in legal_moves(board) if -result_under_best_play(place(board, cell)) == result]


def opponent_move(board: str, strength: float, seed: int) -> int:
    """The move of an opponent that plays a best move with probability `strength`, else any legal one.

    Ties are broken at random. The move depends on the seed and the board (hence the turn) alone: the same game can be
    replayed, and no single line of play can be learnt by heart.
    """
    rng = random.Random(f"{seed}/{board}")
    return rng.choice(best_moves(board) if rng.random() < strength else legal_moves(board))


def random_board(rng: random.Random, num_plies: int) -> str | None:
    """The board after `num_plies` random moves, or None when the game ended before or there."""
    board = EMPTY
    for _ in range(num_plies):
        if is_over(board):
            return None
        board = place(board, rng.choice(legal_moves(board)))
    return None if is_over(board) else board


def render(board: str) -> str:
    """The board in one line, free cells by their number, rows parted by `/`: `X 2 O / 4 X 6 / 7 8 O`."""
    cells = [str(index + 1) if mark == "." else mark for index, mark in enumerate(board)]
    return " / ".join(" ".join(cells[row : row + 3]) for row in (0, 3, 6))
