"""Roles: named, checked, and played by the solver so that a model can learn their turns."""

import json
import re

import pytest

from adamba.errors import UserError
from adamba.tasks import TASKS
from adamba.tasks.roles import ROLES, role_messages, role_tools, select_roles

PATH = TASKS["plan_path"].environment


def test_roles_come_in_their_order_with_their_own_prompts() -> None:
    roles = select_roles({"actor": {"system_prompt": "Move."}, "planner": {}}, PATH)
    assert [role.name for role in roles] == ["actor", "planner"]
    assert roles[0].system_prompt == "Move." and roles[1] == ROLES["planner"]
    assert [schema["function"]["name"] for schema in role_tools(roles[0], PATH)] == ["move"]
    assert role_tools(roles[1], PATH) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["planner", "boss"], "roles: unknown role 'boss'; known roles are planner, actor"),
        ({"actor": {"mood": "good"}}, "roles: actor: unknown key 'mood'"),
        ({"actor": {"tools": ["fly"]}}, "roles: actor: no tool named 'fly' in PlanPathEnvironment; use move"),
        (["coder"], "no tool named 'submit' in PlanPathEnvironment"),
        (["planner"], "roles: planner cannot act"),
        ({}, "roles: none cannot act"),
        (None, "roles: got null, needs mapping of text to .* or list of text"),
        ("planner", "roles: got 'planner' .text., needs mapping"),
        ({"actor": 3}, "roles: actor: got 3 .a whole number., needs mapping"),
        ({"actor": {"tools": "move"}}, "roles: actor: tools: got 'move' .text., needs list of text"),
        ({"actor": {"system_prompt": 5}}, "roles: actor: system_prompt: got 5 .a whole number., needs text"),
    ],
)
def test_a_bad_team_gets_one_line(given, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        select_roles(given, PATH)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("fraction", ["some", None, 1.5, float("nan")])
def test_a_bad_share_of_roles_gets_one_line(fraction: object) -> None:
    with pytest.raises(UserError, match="role_fraction: .*(needs number|must be between 0 and 1)"):
        TASKS["plan_path"].example(0, "train", role_fraction=fraction)


@pytest.mark.parametrize("name", ["plan_path", "sudoku", "sokoban"])
def test_examples_of_roles_are_the_solvers_turns(name: str) -> None:
    seen, num_refused, num_done = set(), 0, 0
    for seed in range(60):
        row = TASKS[name].example(seed, "train", roles=["planner", "actor"], role_fraction=1.0)
        system, user, turn = row["messages"]
        environment = TASKS[name].environment()
        tool, argument = environment._tool
        role = next(role for role in ROLES.values() if role.system_prompt == system["content"])
        board, _, note = user["content"].partition("\nplanner: ")
        seen.add((role.name, bool(note)))
        num_done += "\nDone: " in board
        if refused := re.search(r"\nRefused: (\S+) [A-Z].*\.$", board):
            num_refused += 1
            done = (
                turn["tool_calls"][0]["function"]["arguments"][argument] if role.name == "actor" else turn["content"]
            )
            assert done != refused.group(1), "the solver repeats what was refused"
        assert row["tools"] == role_tools(role, type(environment))
        if role.name == "planner":
            assert not note and turn["content"]
        else:
            said = turn["tool_calls"][0]["function"]
            assert said["name"] == tool and said["arguments"][argument]
            assert role_messages(role, board, [("planner", note)])[1] == user
    assert seen == {("planner", False), ("actor", True)} and 0 < num_refused < 30 and 3 < num_done < 60
    same = [TASKS[name].example(3, "train", role_fraction=1.0) for _ in range(2)]
    assert json.dumps(same[0]) == json.dumps(same[1])
    assert len(TASKS[name].example(3, "train", role_fraction=0.0)["messages"]) > 3
