"""The rules and the solver, against the known numbers of the game."""

import itertools
import random
from collections import Counter
from functools import cache

import pytest

from adamba.tasks.tic_tac_toe_rules import (
    EMPTY,
    best_moves,
    is_over,
    legal_moves,
    minimax,
    opponent_move,
    place,
    random_board,
    render,
    result_under_best_play,
    safe_moves,
    to_move,
    winner,
)


@cache
def reachable() -> frozenset[str]:
    found, frontier = {EMPTY}, {EMPTY}
    while frontier:
        frontier = {place(board, cell) for board in frontier for cell in legal_moves(board)} - found
        found |= frontier
    return frozenset(found)


def test_known_counts() -> None:
    boards = reachable()
    assert len(boards) == 5478
    ends = Counter(winner(board) for board in boards if is_over(board))
    assert ends == {"X": 626, "O": 316, None: 16}

    @cache
    def num_games(board: str) -> int:
        return 1 if is_over(board) else sum(num_games(place(board, cell)) for cell in legal_moves(board))

    assert num_games(EMPTY) == 255168


def test_value_of_every_board_by_plain_search() -> None:
    @cache
    def plain(board: str) -> int:
        if winner(board):
            return -1
        return max((-plain(place(board, cell)) for cell in legal_moves(board)), default=0)

    for board in reachable():
        assert result_under_best_play(board) == plain(board)
        if not is_over(board):
            assert set(best_moves(board)) <= set(safe_moves(board)) <= set(legal_moves(board))
            assert best_moves(board)
    assert result_under_best_play(EMPTY) == 0 and best_moves(EMPTY) == list(range(1, 10))


def test_wins_at_once_and_puts_a_loss_off() -> None:
    assert best_moves("XX.OO....") == [3]
    assert minimax("XX.OO....") > minimax("X..OO.X..")
    assert best_moves("XX..O....") == [3]  # O blocks, though other moves may lose as well


def test_illegal_moves_are_refused() -> None:
    for board, cell in (("X........", 1), (EMPTY, 0), (EMPTY, 10), ("XXXOO....", 9)):
        with pytest.raises(ValueError, match=f"cell {cell}"):
            place(board, cell)
    assert to_move(EMPTY) == "X" and to_move("X........") == "O"


@pytest.mark.parametrize("student", ["X", "O"])
def test_the_perfect_opponent_never_loses_whatever_is_played(student: str) -> None:
    @cache
    def student_can_win(board: str) -> bool:
        if is_over(board):
            return winner(board) == student
        moves = legal_moves(board) if to_move(board) == student else best_moves(board)
        return any(student_can_win(place(board, cell)) for cell in moves)

    assert not student_can_win(EMPTY)


def test_opponents_break_ties_at_random_but_repeatably() -> None:
    moves = [opponent_move(EMPTY, 1.0, seed) for seed in range(300)]
    assert moves == [opponent_move(EMPTY, 1.0, seed) for seed in range(300)]
    assert set(moves) == set(range(1, 10))
    board = "XX.OO...."
    assert {opponent_move(board, 1.0, seed) for seed in range(50)} == {3}
    assert {opponent_move(board, 0.0, seed) for seed in range(100)} == set(legal_moves(board))
    share = sum(opponent_move(board, 0.5, seed) == 3 for seed in range(1000)) / 1000
    assert 0.5 + 0.5 / 5 - 0.06 < share < 0.5 + 0.5 / 5 + 0.06


def test_random_boards_reach_most_positions() -> None:
    rng = random.Random(0)
    boards = {random_board(rng, plies) for plies, _ in itertools.product(range(9), range(2500))} - {None}
    running = {board for board in reachable() if not is_over(board)}
    assert boards <= running and len(boards) > 0.8 * len(running)


def test_render_has_one_place_a_cell() -> None:
    assert render("X.O.X...O") == "X 2 O / 4 X 6 / 7 8 O"
    assert {len(render(board).split()) for board in reachable()} == {11}
