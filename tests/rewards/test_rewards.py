"""Rewards: the solver gets 1.0 from each, and no other policy gets more from any or all of them."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamba.rewards import REWARDS, correctness, select_rewards
from adamba.tasks import TASKS
from adamba.tasks.task import tool_call
from isolation import NO_ISOLATION

Completion = list[dict[str, Any]]

RUN_CODE = ("code", "questions")  # not played where code cannot be isolated
PLAYED = [task_id for task_id in TASKS if not NO_ISOLATION or task_id not in RUN_CODE]
NEEDS_CALLS = [task_id for task_id in PLAYED if task_id != "questions"]  # a question may be answered at once
QUICK = [
    task_id for task_id in PLAYED if task_id != "code"
]  # every submission starts a process; tests/tasks/test_code.py


def run(row: dict, turns: Completion) -> tuple[Completion, Any]:
    """What TRL's tool loop makes of these assistant turns: a turn without a call ends it."""
    environment = next(task for task in TASKS.values() if row["environment"] in task.environments).environments[
        row["environment"]
    ]()
    environment.reset(**row)
    completion: Completion = []
    for turn in turns:
        completion.append(turn)
        for call in turn.get("tool_calls") or []:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            try:
                result = getattr(environment, name)(**arguments)
            except (TypeError, AttributeError) as error:
                result = str({"error": str(error)})
            completion.append({"role": "tool", "name": name, "content": result})
        if not turn.get("tool_calls"):
            break
    return completion, environment


def rewards_of(row: dict, turns: Completion) -> dict[str, float]:
    completion, environment = run(row, turns)
    return {
        name: reward(
            prompts=[row["prompt"]], completions=[completion], environments=[environment], trainer_state=None, seed=[1]
        )[0]
        for name, reward in REWARDS.items()
    }


def solver_turns(task_id: str, seed: int, **options: object) -> tuple[dict, Completion]:
    """A row and the solver's turns on it."""
    task = TASKS[task_id]
    row = task.prompt(seed, "train", **options)
    if task_id != "tic_tac_toe":
        messages = task.example(seed, "train", **options)["messages"]
        return row, [message for message in messages if message["role"] == "assistant"]
    from adamba.tasks.tic_tac_toe import RESULTS
    from adamba.tasks.tic_tac_toe_rules import best_moves

    environment = task.environment()
    environment.reset(**row)
    turns: Completion = []
    while not environment._done:
        cell = best_moves(environment._board)[0]
        turns.append(tool_call("play", cell=cell))
        environment.play(cell)
    return row, [*turns, {"role": "assistant", "content": RESULTS[environment._result()][1]}]


@pytest.mark.parametrize(
    ("task_id", "options"),
    [*((task_id, {}) for task_id in PLAYED), ("calculator", {"tool_free": True}), ("questions", {"tool_free": True})],
)
def test_the_solver_gets_one_from_every_reward(task_id: str, options: dict) -> None:
    for seed in range(5 if task_id == "code" else 60):
        row, turns = solver_turns(task_id, seed, **options)
        assert rewards_of(row, turns) == dict.fromkeys(REWARDS, 1.0)


contents = st.one_of(
    st.sampled_from(
        ["", "I win.", "Draw.", "I lose.", '# Answer: "1.0"', "<tool_call>{", "COPY", "Solved.", "Answer: 1"]
    ),
    st.text(max_size=20),
)
walks = st.text(alphabet="UDLR", min_size=1, max_size=4)
cells = st.lists(st.integers(111, 449).map(str), min_size=1, max_size=4).map(" ".join)
calls = st.one_of(
    st.builds(lambda cell: tool_call("play", cell=cell), st.one_of(st.integers(-1, 11), st.text(max_size=2))),
    st.builds(lambda text: tool_call("calculator", expression=text), st.sampled_from(["1 + 1", "1 / 0", "x", ""])),
    st.builds(lambda moves: tool_call("move", moves=moves), st.one_of(walks, st.text(max_size=5), st.none())),
    st.builds(lambda cells: tool_call("fill", cells=cells), st.one_of(cells, st.text(max_size=5), st.none())),
    st.just(tool_call("code_interpreter", code=5)),
    st.just(tool_call("nothing")),
)
any_turns = st.lists(
    st.one_of(calls, contents.map(lambda text: {"role": "assistant", "content": text})), min_size=1, max_size=12
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(QUICK), st.integers(0, 10_000), any_turns)
def test_nothing_scores_above_the_solver(task_id: str, seed: int, turns: Completion) -> None:
    row = TASKS[task_id].prompt(seed, "train")
    turns = [turn | {"content": row["prompt"][0]["content"]} if turn["content"] == "COPY" else turn for turn in turns]
    rewards = rewards_of(row, turns)
    assert all(0.0 <= reward <= 1.0 for reward in rewards.values())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([name for name in QUICK if name in NEEDS_CALLS]),
    st.integers(0, 10_000),
    st.integers(1, 12),
    st.randoms(),
)
def test_more_calls_or_fewer_never_pay(task_id: str, seed: int, count: int, rng: random.Random) -> None:
    row, turns = solver_turns(task_id, seed)
    solver = sum(rewards_of(row, turns).values())
    repeated = turns[:-1] + [turns[0]] * count + turns[-1:]
    assert sum(rewards_of(row, repeated).values()) < solver
    assert (
        sum(rewards_of(row, turns[: rng.randrange(len(turns))] or [{"role": "assistant", "content": ""}]).values())
        < solver
    )
    assert sum(rewards_of(row, [turns[0]] * 20).values()) < solver
    assert sum(rewards_of(row, turns[-1:]).values()) < solver


def test_idle_and_copying_policies_get_nothing_for_correctness() -> None:
    for task_id in PLAYED:
        for seed in range(30):
            row = TASKS[task_id].prompt(seed, "train")
            for text in ("", row["prompt"][0]["content"], "I win.", '# Answer: "0"', "Solved."):
                rewards = rewards_of(row, [{"role": "assistant", "content": text}])
                assert rewards["correctness"] == rewards["efficiency"] == 0.0, task_id
                assert rewards["tool_use"] == (task_id not in NEEDS_CALLS), task_id


def test_text_around_a_call_or_two_calls_in_a_turn_cost_the_format() -> None:
    row, turns = solver_turns("calculator", 3)
    chatty = [turns[0] | {"content": "Let me see."}, turns[1]]
    double = [turns[0] | {"tool_calls": turns[0]["tool_calls"] * 2}, turns[1]]
    assert rewards_of(row, chatty)["format"] == rewards_of(row, double)["format"] == 0.0
    assert rewards_of(row, double)["tool_use"] == 0.5


def test_a_call_is_graded_by_name_argument_names_and_argument_values() -> None:
    row, turns = solver_turns("plan_path", 4, min_steps=5)

    def grades(*calls: dict) -> tuple[float, ...]:
        rewards = rewards_of(row, [*calls, turns[-1]])
        return tuple(rewards[f"tool_{part}"] for part in ("name", "argument_names", "argument_values"))

    best = turns[:-1]
    assert len(best) == 2 and grades(*best) == (1.0, 1.0, 1.0)
    assert grades(best[0], tool_call("jump", moves="R")) == (0.5, 0.5, 0.5)
    assert grades(best[0], tool_call("move", steps="R")) == (1.0, 0.5, 0.5)
    assert grades(best[0], tool_call("move", moves=5)) == (1.0, 1.0, 0.5)
    assert grades(best[0]) == (0.5, 0.5, 0.5)
    assert grades(*best, *best) == (0.5, 0.5, 0.5)
    assert grades() == (0.0, 0.0, 0.0)


def test_several_rows_keep_their_order() -> None:
    row, turns = solver_turns("calculator", 3)
    good, good_environment = run(row, turns)
    bad, bad_environment = run(row, [{"role": "assistant", "content": "?"}])
    completions, environments = [bad, good, bad], [bad_environment, good_environment, bad_environment]
    assert correctness([row["prompt"]] * 3, completions, environments) == [0.0, 1.0, 0.0]


def test_selection_by_name_and_weight() -> None:
    functions, weights = select_rewards({"correctness": 1, "format": 0.2})
    assert functions == [REWARDS["correctness"], REWARDS["format"]] and weights == [1.0, 0.2]
    assert [function.__name__ for function in functions] == ["correctness", "format"]
    with pytest.raises(ValueError, match="'speed'.*correctness"):
        select_rewards({"speed": 1.0})
    with pytest.raises(ValueError, match="empty"):
        select_rewards({})
    with pytest.raises(ValueError, match="environment_factory"):
        correctness([], [])
