"""Sokoban, sudoku and plan_path: solvable, solved exactly, givens and walls that hold, no reward to farm."""

import copy
import itertools
import random
from collections import deque

import pytest
from transformers.utils import get_json_schema

from adamba.tasks import TASKS
from adamba.tasks import sokoban_rules as boards
from adamba.tasks import sudoku_rules as grids
from adamba.tasks.plan_path_rules import distances, goal_of, position_of, walk

PUZZLES = {"sokoban": ("move", "moves"), "sudoku": ("fill", "cells"), "plan_path": ("move", "moves")}
HARDER = {
    "sokoban": {"size": 7, "boxes": 2, "min_moves": 6, "max_moves": 30, "moves_per_call": 8},
    "sudoku": {"size": 9, "min_blanks": 20, "max_blanks": 30, "cells_per_call": 9},
    "plan_path": {"size": 9, "block_ratio": 0.35, "min_steps": 8, "max_steps": 30, "moves_per_call": 1},
}


def started(name: str, row: dict):
    environment = TASKS[name].environment()
    assert environment.reset(**row) is None
    return environment


def call(environment, name: str, value: object) -> str:
    tool, argument = PUZZLES[name]
    return getattr(environment, tool)(**{argument: value})


@pytest.mark.parametrize(("name", "harder"), list(itertools.product(PUZZLES, (False, True))))
def test_the_solver_solves_with_least_work_and_scores_one(name: str, harder: bool) -> None:
    settings = HARDER[name] if harder else {}
    for seed in range(10 if harder else 50):
        row = TASKS[name].prompt(seed, "test", **settings)
        environment = started(name, row)
        for _ in range(environment._best_calls):
            value = environment._solver_argument()
            assert value == copy.deepcopy(environment)._solver_argument()
            assert not environment._done
            text = call(environment, name, value)
        assert text == f"{environment._observation()}\nSolved."
        outcome = environment._outcome("Solved.")
        assert outcome["score"] == outcome["well_formed"] == outcome["solved"] == 1.0
        assert (
            outcome["good_calls"] == outcome["valid_calls"] == outcome["best_calls"] and not outcome["invalid_calls"]
        )


@pytest.mark.parametrize("name", PUZZLES)
def test_examples_and_preferences_are_the_solvers(name: str) -> None:
    tool, argument = PUZZLES[name]
    for seed in range(30):
        example = TASKS[name].example(seed, "train")
        row = TASKS[name].prompt(seed, "train")
        environment = started(name, row)
        prompt, *turns, last = example["messages"]
        assert [prompt] == row["prompt"] and environment._observation() in prompt["content"]
        for turn, answer in zip(turns[::2], turns[1::2], strict=True):
            function = turn["tool_calls"][0]["function"]
            assert function == {"name": tool, "arguments": {argument: environment._solver_argument()}}
            assert answer["content"] == call(environment, name, function["arguments"][argument])
        assert last["content"] == "Solved." and environment._is_solved()

        pair = TASKS[name].preference(seed, "train")
        state = started(name, row)
        for message in pair["prompt"]:
            for one in message.get("tool_calls", []):
                call(state, name, one["function"]["arguments"][argument])
        good, bad = (
            pair[key][0]["tool_calls"][0]["function"]["arguments"][argument] for key in ("chosen", "rejected")
        )
        assert good == state._solver_argument() != bad
        worse = copy.deepcopy(state)
        call(state, name, good)
        call(worse, name, bad)
        assert state._count_good() > worse._count_good()


@pytest.mark.parametrize(("name", "there", "back"), [("sokoban", "L", "R"), ("plan_path", "U", "D")])
def test_calls_are_good_again_after_a_stray_one(name: str, there: str, back: str) -> None:
    row = {"board": "#######\n#-@$-.#\n#######", "best_moves": 2, "grid": "...\n@..\n..G", "moves_per_call": 1}
    environment = started(name, row)
    counts = []
    for value in (there, back, environment._solver_argument()):
        call(environment, name, value)
        counts.append(environment._count_good())
    assert counts == [0, 1, 2]


def test_no_call_is_good_on_a_board_that_is_lost() -> None:
    board = "#####\n#--.#\n#-$-#\n#-@-#\n#####"
    environment = started("sokoban", {"board": board, "best_moves": 4, "moves_per_call": 2})
    for moves in ("U", "RU", "L", "R"):
        environment.move(moves)
        assert environment._count_good() == 1
    assert boards.solve(environment._board) is None


@pytest.mark.parametrize("name", PUZZLES)
def test_instances_repeat_by_seed_and_splits_are_disjoint(name: str) -> None:
    column = {"sokoban": "board", "sudoku": "puzzle", "plan_path": "grid"}[name]
    train, test = ({TASKS[name].prompt(seed, split)[column] for seed in range(300)} for split in ("train", "test"))
    assert len(train) > 250 and len(test) > 100 and not train & test
    assert TASKS[name].example(7, "train") == TASKS[name].example(7, "train") != TASKS[name].example(8, "train")
    if name == "sudoku":  # not even a solved grid is shared
        assert not {grids.solution(puzzle) for puzzle in train} & {grids.solution(puzzle) for puzzle in test}


@pytest.mark.parametrize("name", PUZZLES)
def test_no_other_play_scores_more_and_every_episode_ends(name: str) -> None:
    rng = random.Random(name)
    letters = {"sokoban": "UDLR", "plan_path": "UDLR", "sudoku": ""}[name]
    for seed in range(100):
        environment = started(name, TASKS[name].prompt(seed, "train"))
        count = 0
        while not environment._done:
            count += 1
            if rng.random() < 0.3:
                value = environment._solver_argument()
            elif letters:
                value = "".join(rng.choice(letters) for _ in range(rng.randint(1, 4)))
            else:
                value = f"{rng.randint(1, 4)}{rng.randint(1, 4)}{rng.randint(1, 4)}"
            call(environment, name, value)
        assert environment._done and count <= environment._max_calls + 2
        outcome = environment._outcome("Solved.")
        assert 0.0 <= outcome["score"] <= 1.0
        if not environment._is_solved():
            assert outcome["score"] <= 0.2 and outcome["well_formed"] == 0.0
        assert call(environment, name, value).startswith("It is over.")
        assert environment._outcome()["invalid_calls"] == outcome["invalid_calls"] + 1


@pytest.mark.parametrize(("name", "back_and_forth"), [("plan_path", ("UD", "DU", "LR", "RL")), ("sokoban", ("UD",))])
def test_going_to_and_fro_or_into_walls_earns_nothing(name: str, back_and_forth: tuple[str, ...]) -> None:
    for seed in range(30):
        row = (
            TASKS[name].prompt(seed, "train", min_steps=4)
            if name == "plan_path"
            else TASKS[name].prompt(seed, "train")
        )
        for value in (*back_and_forth, "UUUU", "LLLL"):
            environment = started(name, row)
            while not environment._done:
                call(environment, name, value)
            assert environment._is_solved() or environment._score() <= 0.2 * environment._progress()
            assert environment._is_solved() or environment._progress() < 1.0


@pytest.mark.parametrize("name", PUZZLES)
@pytest.mark.parametrize("value", [None, 5, "", "X", "rrd", "U" * 9, ["U"], True, "\0", "111 " * 5, "999", "1" * 5000])
def test_what_is_no_call_is_refused_and_ends_the_third_time(name: str, value: object) -> None:
    environment = started(name, TASKS[name].prompt(0, "train"))
    before = environment._observation()
    answers = [call(environment, name, value) for _ in range(3)]
    assert answers[0].endswith(f"\n{before}") and answers[0] == answers[1] and answers[2].endswith(" Not solved.")
    assert environment._observation() == before and environment._done
    assert environment._outcome("Not solved.")["well_formed"] == 1.0 and environment._score() == 0.0


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sokoban", {"size": 4}, "size is 4"),
        ("sokoban", {"boxes": 0}, "boxes is 0"),
        ("sokoban", {"min_moves": 9, "max_moves": 3}, "min_moves 9"),
        ("sokoban", {"min_moves": 300, "max_moves": 300, "size": 5}, "no train instance"),
        ("sudoku", {"size": 6}, "size is 6; use 4 or 9"),
        ("sudoku", {"max_blanks": 16}, "max_blanks 16"),
        ("sudoku", {"cells_per_call": 0}, "cells_per_call is 0"),
        ("plan_path", {"size": 1}, "size is 1"),
        ("plan_path", {"block_ratio": 1.0}, "block_ratio is 1.0"),
        ("plan_path", {"min_steps": 0}, "min_steps 0"),
        ("plan_path", {"moves": 3}, "unknown key 'moves'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        TASKS[name].prompt(0, "train", **settings)
    assert "\n" not in str(error.value) and f"settings of task {name}" in str(error.value)


@pytest.mark.parametrize("name", PUZZLES)
def test_the_schema_is_that_of_the_environment(name: str) -> None:
    [schema] = TASKS[name].example(0, "train")["tools"]
    assert schema == get_json_schema(getattr(TASKS[name].environment(), PUZZLES[name][0]))


def shortest_by_hand(board: str) -> int:
    """Fewest moves by plain breadth-first search over boards, with nothing of the solver in it."""
    queue, seen = deque([(board, 0)]), {board}
    while queue:
        here, length = queue.popleft()
        if "$" not in here:
            return length
        for move in "UDLR":
            after = boards.play(here, move)
            if after is not None and after not in seen:
                seen.add(after)
                queue.append((after, length + 1))
    raise AssertionError("no solution")


def test_sokoban_solutions_are_the_shortest() -> None:
    for seed in range(20):
        row = TASKS["sokoban"].prompt(seed, "train", boxes=1 + seed % 2)
        assert row["best_moves"] == shortest_by_hand(row["board"]) == len(boards.solve(row["board"]))
        assert boards.is_solved(boards.play(row["board"], boards.solve(row["board"])))
        assert boards.solve(row["board"], row["best_moves"] - 1) is None


def test_sokoban_rules() -> None:
    board = "######\n#@$.-#\n#-$--#\n######"
    assert boards.play(board, "R") == "######\n#-@*-#\n#-$--#\n######"
    assert boards.play(board, "RR") == "######\n#--+$#\n#-$--#\n######"
    assert boards.play(board, "RRR") is None and boards.play(board, "L") is None and boards.play(board, "X") is None
    assert boards.play(board, "RD") is None  # a wall behind the box
    assert boards.solve("#####\n#$@.#\n#####") is None  # a box in a corner


def test_sudoku_has_one_solution_and_its_givens_hold() -> None:
    for seed in range(30):
        puzzle = TASKS["sudoku"].prompt(seed, "train")["puzzle"]
        blanks = [cell for cell, mark in enumerate(puzzle) if mark == grids.EMPTY]
        fits = [
            filled
            for digits in itertools.product("1234", repeat=len(blanks))
            if len(blanks) <= 5
            for filled in ["".join(dict(zip(blanks, digits, strict=True)).get(c, m) for c, m in enumerate(puzzle))]
            if all(filled[cell] not in {filled[peer] for peer in grids.peers(4)[cell]} for cell in range(16))
        ]
        assert fits == [grids.solution(puzzle)] or len(blanks) > 5
        environment = started("sudoku", TASKS["sudoku"].prompt(seed, "train"))
        given = next(cell for cell, mark in enumerate(puzzle) if mark != grids.EMPTY)
        answer = environment.fill(f"{given // 4 + 1}{given % 4 + 1}{5 - int(puzzle[given])}")
        assert answer.startswith("A given cell.") and environment._grid == puzzle
        first = environment._solver_argument().split()[0]
        environment.fill(first)
        assert environment.fill(first).startswith("It says so already.")


def test_sudoku_solutions_of_nine_are_unique() -> None:
    puzzle = TASKS["sudoku"].prompt(3, "train", **HARDER["sudoku"])["puzzle"]
    assert len(grids.solutions(puzzle, 2)) == 1 and 20 <= puzzle.count(grids.EMPTY) <= 30
    with pytest.raises(ValueError, match="no solution"):
        grids.solution("11" + grids.EMPTY * 14)


def test_plan_path_distances_are_those_of_single_steps() -> None:
    for seed in range(30):
        grid = TASKS["plan_path"].prompt(seed, "train")["grid"]
        goal = goal_of(grid)
        away = distances(grid, goal)
        for position, steps in away.items():
            around = [walk(grid, position, move) for move in "UDLR"]
            assert steps == 0 or min(away[other] for other in around if other is not None) == steps - 1
        assert 2 <= away[position_of(grid)] <= 16


def test_a_detour_is_worth_less_than_the_shortest_way() -> None:
    environment = started("plan_path", {"grid": "@..\n...\n..G", "moves_per_call": 4})
    environment.move("RL")
    environment.move("RRDD")
    assert environment._outcome()["score"] == pytest.approx(0.5 + 0.5 * 4 / 6)
