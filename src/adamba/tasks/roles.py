"""Roles that share one environment: who they are, what each reads, and how the solver plays them.

In a turn the roles speak in order. One that proposes writes what it would do, one that calls acts by the task's
tools, one that answers ends the episode with its text. Each reads the state as it is now and what the others said
before it in this turn.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from adamba.errors import UserError
from adamba.recipe_values import fit
from adamba.tasks.task import Message, Row, Split, tool_schemas

WRONG_NOTE_FRACTION = 0.25  # of the solver's callers are told something worse and do right all the same
REFUSED_FRACTION = 0.25  # of the solver's turns follow a worse call, which is shown where it was refused: one in six
MAX_NOTE_CHARACTERS = 200


@dataclass(frozen=True)
class Role:
    """One agent of a team.

    Attributes:
        name: As the other roles read it.
        system_prompt: What it is told first.
        speaks: `proposal`, `call` or `answer`.
        tools: Names of the tools that it may call; empty: all of the environment's.
    """

    name: str
    system_prompt: str
    speaks: Literal["proposal", "call", "answer"] = "call"
    tools: tuple[str, ...] = ()


ROLES: dict[str, Role] = {
    role.name: role
    for role in (
        Role("planner", "Plan.", "proposal"),
        Role("actor", "Act.", "call"),
        Role("coder", "Write the function.", "call", ("submit",)),
        Role("tester", "Test it.", "call", ("code_interpreter",)),
        Role("tool_user", "Compute.", "call"),
        Role("solver", "Answer.", "answer"),
    )
}
SETTINGS: dict[str, Any] = {"system_prompt": str, "tools": tuple[str, ...]}  # of a role that a recipe may change
DEFAULT_ROLES = ("planner", "actor")  # of a puzzle's examples, where the recipe names none


def select_roles(given: Sequence[str] | dict[str, Any], environment_class: type) -> tuple[Role, ...]:
    """Roles in their order, from names or from name → `{system_prompt, tools}`.

    Raises:
        UserError: an unknown role, setting or tool, a value of another type, no role, or none that can change or end
            anything.
    """
    fitting = _fit("roles", given, dict[str, Any] | list[str])
    overrides = fitting if isinstance(fitting, dict) else dict.fromkeys(fitting)
    known_tools = [schema["function"]["name"] for schema in tool_schemas(environment_class)]
    roles = []
    for name, given_changes in overrides.items():
        if name not in ROLES:
            raise UserError(f"roles: unknown role {name!r}; known roles are {', '.join(ROLES)}")
        changes = _fit(f"roles: {name}", given_changes, dict[str, Any] | None) or {}
        for key in changes:
            if key not in SETTINGS:
                raise UserError(f"roles: {name}: unknown key {key!r}; known keys are {', '.join(SETTINGS)}")
        changes = {key: _fit(f"roles: {name}: {key}", value, SETTINGS[key]) for key, value in changes.items()}
        role = replace(ROLES[name], **changes)
        for tool in role.tools:
            if tool not in known_tools:
                offered = ", ".join(known_tools) or "none"
                raise UserError(
                    f"roles: {name}: no tool named {tool!r} in {environment_class.__name__}; use {offered}"
                )
        roles.append(role)
    if all(role.speaks == "proposal" for role in roles):
        raise UserError(f"roles: {', '.join(overrides) or 'none'} cannot act; add one that does, for instance actor")
    return tuple(roles)


def _fit(place: str, value: Any, hint: Any) -> Any:
    try:
        return fit(value, hint)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None


def role_messages(role: Role, observation: str, notes: Sequence[tuple[str, str]]) -> list[Message]:
    """What a role reads: who it is, the state, and what the roles before it said in this turn."""
    text = "\n".join([observation, *(f"{name}: {said}" for name, said in notes)])
    return [{"role": "system", "content": role.system_prompt}, {"role": "user", "content": text}]


def accepted(argument: str) -> str:
    """How the last call that was not refused stands under the state that it led to.

    Roles read the state, not the past: without this line one that goes back to where the team came from would not know
    it, and the team would go to and fro until its calls are used up.
    """
    return f"Done: {argument[:MAX_NOTE_CHARACTERS]}"


def refusal(argument: str, result: str) -> str:
    """How a refused call stands under the state that it left as it was.

    Without this line nothing would have changed for the roles, and what is likeliest would be called, and refused,
    again.
    """
    reason = result.partition("\n")[0]
    return " ".join(filter(None, ("Refused:", argument[:MAX_NOTE_CHARACTERS], reason)))


def role_tools(role: Role, environment_class: type) -> list[dict]:
    """Schemas of the tools that a role may call."""
    if role.speaks != "call":
        return []
    schemas = tool_schemas(environment_class)
    return [schema for schema in schemas if not role.tools or schema["function"]["name"] in role.tools]


def role_example(environment: Any, roles: Sequence[Role], worse: Any, task: str, seed: int, split: Split) -> Row:
    """One turn of one role in a puzzle that the solver plays, `{"messages", "tools"}`: a random role, a random turn.

    Args:
        environment: A puzzle that has just been reset.
        worse: As in `puzzle_task`.
    """
    rng = random.Random(f"{task}/roles/{split}/{seed}")
    past = []
    for _ in range(rng.randrange(environment._best_calls)):
        past = [accepted(environment._solver_argument())]
        environment._solver_turn()
    if rng.random() < REFUSED_FRACTION:
        past += _refused_call(environment, worse, rng)
    index = rng.randrange(len(roles))
    best = environment._solver_argument()
    wrong = roles[index].speaks == "call" and rng.random() < WRONG_NOTE_FRACTION
    notes = [
        (role.name, worse(environment, rng) if wrong else best) for role in roles[:index] if role.speaks == "proposal"
    ]
    role = roles[index]
    turn = environment._call(best) if role.speaks == "call" else {"role": "assistant", "content": best}
    return {
        "messages": [*role_messages(role, "\n".join([environment._observation(), *past]), notes), turn],
        "tools": role_tools(role, type(environment)),
    }


def _refused_call(environment: Any, worse: Any, rng: random.Random) -> list[str]:
    """The line about a worse call, if it would be refused as the puzzle stands."""
    trial, argument = copy.deepcopy(environment), worse(environment, rng)
    result = getattr(trial, environment._tool[0])(argument)
    return [] if trial._valid_calls > environment._valid_calls else [refusal(argument, result)]
