"""The tic-tac-toe task: real games, perfect solver, a score that nothing can farm."""

import random
import re
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import get_json_schema

from adamba.tasks import TASKS
from adamba.tasks.tic_tac_toe import RESULTS, TicTacToeEnvironment
from adamba.tasks.tic_tac_toe_rules import (
    EMPTY,
    best_moves,
    legal_moves,
    place,
    render,
    result_under_best_play,
    safe_moves,
    to_move,
    winner,
)

TASK = TASKS["tic_tac_toe"]
Policy = Callable[[str], int]


def board_of(text: str) -> str:
    """The last board shown in a text."""
    [line] = [line for line in text.split("\n") if line.count("/") == 2]
    return re.sub(r"\d", ".", line.replace(" ", "").replace("/", ""))


def play_out(row: dict, policy: Policy, max_calls: int = 20) -> TicTacToeEnvironment:
    environment = TicTacToeEnvironment()
    assert environment.reset(**row) is None
    for _ in range(max_calls):
        if environment._done:
            break
        environment.play(policy(environment._board))
    return environment


def test_examples_are_whole_games_of_a_perfect_player() -> None:
    for seed in range(500):
        row = TASK.example(seed, "train")
        prompt, *turns, last = row["messages"]
        board = board_of(prompt["content"])
        mark = to_move(board)
        assert f" {mark}." in prompt["content"].split("\n")[0]
        for call, answer in zip(turns[::2], turns[1::2], strict=True):
            cell = call["tool_calls"][0]["function"]["arguments"]["cell"]
            assert call["content"] == "" and cell in best_moves(board)
            after = place(board, cell)
            board = board_of(answer["content"])
            assert board == after or board in {place(after, reply) for reply in legal_moves(after)}
        assert not legal_moves(board)
        result = 0 if winner(board) is None else 1 if winner(board) == mark else -1
        told, said = RESULTS[result]
        assert answer["content"] == f"{render(board)}\n{told}" and last["content"] == said


def test_games_cover_both_sides_all_opponents_all_openings_and_most_positions() -> None:
    rows = [TASK.prompt(seed, "train") for seed in range(3000)]
    assert {row["opponent"] for row in rows} == {"perfect", "random", "mixed"}
    marks = Counter(to_move(row["board"]) for row in rows)
    assert 0.4 < marks["X"] / len(rows) < 0.6
    assert {row["board"] for row in rows if row["board"].count(".") == 8} == {place(EMPTY, c) for c in range(1, 10)}
    assert all(result_under_best_play(row["board"]) >= 0 for row in rows)
    seen = set()
    for seed in range(3000):
        messages = TASK.example(seed, "train")["messages"]
        seen |= {board_of(m["content"]) for m in messages[:-1] if m["role"] != "assistant"}
    assert len(seen) > 1800  # of 4520 with a move to make, and every one can occur


def test_settings_are_obeyed() -> None:
    for seed in range(100):
        row = TASK.prompt(seed, "test", opponent="perfect", random_start_fraction=0.0, mark="O")
        assert row["opponent"] == "perfect" and row["strength"] == 1.0 and row["board"].count(".") == 8
        row = TASK.prompt(
            seed, "train", opponent={"random": 1.0}, random_start_fraction=1.0, max_safe_move_fraction=0.5
        )
        assert row["opponent"] == "random"
        assert len(safe_moves(row["board"])) <= 0.5 * len(legal_moves(row["board"]))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"opponent": "strong"}, "'strong'"),
        ({"opponent": {"weak": 1.0}}, "'weak'"),
        ({"opponent": {"perfect": 0}}, "only zeros"),
        ({"opponent": {"perfect": -1, "random": 2}}, "negative weights"),
        ({"opponent": 3}, "opponent: got 3"),
        ({"random_start_fraction": "half"}, "random_start_fraction: got 'half'"),
        ({"mark": "Z"}, "'Z'"),
        ({"max_start_plies": 9}, "max_start_plies is 9"),
        ({"board": "X"}, "unknown key 'board'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        TASK.prompt(0, "train", **settings_)
    assert "\n" not in str(error.value) and "tic_tac_toe" in str(error.value)


def test_train_and_test_instances_are_disjoint() -> None:
    keys = {
        split: {
            (row["board"], row["opponent"], row["strength"], row["game_seed"])
            for row in (TASK.prompt(seed, split) for seed in range(1000))
        }
        for split in ("train", "test")
    }
    assert not keys["train"] & keys["test"]
    assert TASK.example(5, "train") == TASK.example(5, "train") != TASK.example(5, "test")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_the_solver_scores_one_and_a_random_player_no_more(seed: int, policy_seed: int) -> None:
    row = TASK.prompt(seed, "train")
    rng = random.Random(policy_seed)
    solver = play_out(row, lambda board: rng.choice(best_moves(board)))
    assert solver._outcome(RESULTS[solver._result()][1])["score"] == 1.0
    other = play_out(row, lambda board: rng.randint(0, 10))
    assert 0.0 <= other._outcome()["score"] <= 1.0
    if other._result() == -1:
        assert other._outcome()["score"] <= 0.2


def test_better_play_scores_more() -> None:
    rng = random.Random(0)
    rows = [TASK.prompt(seed, "train", opponent="perfect") for seed in range(300)]

    def mean(policy: Policy) -> float:
        return sum(play_out(row, policy)._outcome()["score"] for row in rows) / len(rows)

    worst = mean(
        lambda board: rng.choice(sorted(set(legal_moves(board)) - set(safe_moves(board))) or legal_moves(board))
    )
    anything = mean(lambda board: rng.choice(legal_moves(board)))
    half = mean(lambda board: rng.choice(best_moves(board) if rng.random() < 0.7 else legal_moves(board)))
    assert worst + 0.1 < anything < half - 0.1 < half < 0.95
    assert mean(lambda board: rng.choice(best_moves(board))) == 1.0


def test_a_spoilt_win_is_worth_half() -> None:
    environment = TicTacToeEnvironment()
    environment.reset(board="XX.OO....", opponent="perfect", strength=1.0, game_seed=0)
    environment.play(6)  # blocks instead of winning
    while not environment._done:
        environment.play(best_moves(environment._board)[0])
    assert environment._outcome()["draw"] == 1 and 0.5 <= environment._outcome()["score"] <= 0.7


@pytest.mark.parametrize("cell", [0, 10, -1, "five", None, 2.5, True, [1]])
def test_illegal_moves_are_told_counted_and_capped(cell: object) -> None:
    environment = TicTacToeEnvironment()
    environment.reset(board="X........", opponent="random", strength=0.0, game_seed=0)
    assert environment.play(cell) == "Illegal move.\nX 2 3 / 4 5 6 / 7 8 9"  # type: ignore[arg-type]
    assert environment.play(1) == "Illegal move.\nX 2 3 / 4 5 6 / 7 8 9"
    assert environment.play(cell) == "Illegal move. You lose."  # type: ignore[arg-type]
    assert environment.play(5) == "The game is over. You lose."
    outcome = environment._outcome("I lose.")
    assert outcome["loss"] == 1 and outcome["score"] == 0 and outcome["illegal_moves"] == 3
    assert outcome["invalid_calls"] == 4 and outcome["valid_calls"] == 0 and outcome["well_formed"] == 0


def test_a_cell_in_quotes_is_understood() -> None:
    environment = TicTacToeEnvironment()
    environment.reset(board=EMPTY, opponent="random", strength=0.0, game_seed=0)
    assert environment.play("5").count("X") == 1  # type: ignore[arg-type]


def test_an_illegal_move_costs_and_an_unfinished_game_is_lost() -> None:
    row = TASK.prompt(3, "train", opponent="perfect")
    environment = TicTacToeEnvironment()
    environment.reset(**row)
    environment.play(0)
    while not environment._done:
        environment.play(best_moves(environment._board)[0])
    assert environment._outcome()["score"] == pytest.approx(0.5)
    environment.reset(**row)
    assert environment._outcome("I win.") | {"score": 0.0, "loss": 1.0, "win": 0.0} == environment._outcome("I win.")
    environment.play(best_moves(environment._board)[0])
    assert environment._outcome("I win.")["score"] == 0.0


def test_schema_is_that_of_the_environment() -> None:
    [schema] = TASK.example(0, "train")["tools"]
    assert schema == get_json_schema(TicTacToeEnvironment().play)
    assert schema["function"]["parameters"]["properties"]["cell"]["type"] == "integer"


def test_preferences_are_a_best_move_against_an_illegal_one_or_a_blunder() -> None:
    lengths, forced = Counter(), 0
    for seed in range(200):
        row = TASK.preference(seed, "train")
        board = board_of(row["prompt"][-1]["content"])
        best, worse = (
            row[name][0]["tool_calls"][0]["function"]["arguments"]["cell"] for name in ("chosen", "rejected")
        )
        assert best in best_moves(board) and worse in set(range(1, 10)) - set(safe_moves(board))
        lengths[len(row["prompt"])] += 1
        forced += len(safe_moves(board)) == len(legal_moves(board))
    assert len(lengths) >= 3
    assert forced, "turns at which no legal move is bad must be kept alive too"
