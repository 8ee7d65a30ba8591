"""What a task is: a name, its environments, and seeded functions that make conversations, prompts and preferences."""

import hashlib
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_type_hints

from transformers.utils import get_json_schema

from adamba.errors import UserError
from adamba.recipe_values import fit

Split = Literal["train", "test"]
Message = dict[str, Any]
Row = dict[str, Any]
T = TypeVar("T")

TEST_FRACTION_INVERSE = 8  # one instance in eight belongs to the test split
MAX_DRAWS = 10_000


@dataclass(frozen=True)
class Task:
    """One procedural task. Every function is seeded, takes `(seed, split, **settings)` and returns plain data.

    Attributes:
        name: Its id in `TASKS`, in `mix:` and in metric names.
        environments: TRL `environment_factory` classes by name; the first is the default one. `reset(**row)` starts
            the instance of a row, public methods are the tools, `_done` says that no call is expected any more, and
            `_outcome(final_text)` scores the finished episode: at least `score`, `well_formed`, `valid_calls`,
            `invalid_calls` and `best_calls` (the solver's number of calls), with every score in [0, 1].
        example: One solver-played conversation, `{"messages", "tools"}`.
        prompt: One row for RL and evaluation, `{"prompt", "environment", "seed", "split", ...}`.
        preference: One pair for DPO, `{"prompt", "chosen", "rejected", "tools"}`.

    A task that nobody has a solver for passes `no_solver(name)` for the last two: it is played, not imitated.
    """

    name: str
    environments: dict[str, type]
    example: Callable[..., Row]
    prompt: Callable[..., Row]
    preference: Callable[..., Row]

    @property
    def environment(self) -> type:
        """The default environment class."""
        return next(iter(self.environments.values()))


def no_solver(name: str) -> Callable[..., Row]:
    """`Task.example` and `Task.preference` of a task without a solver."""

    def refuse(*args: object, **settings: object) -> Row:
        raise UserError(f"mix: task {name} has no solver to imitate; use it in run_grpo.py and run_eval.py")

    return refuse


def tool_methods(environment: Any) -> list[Callable[..., str]]:
    """The tools of an environment instance, in the order TRL lists them: its public methods except `reset`."""
    members = inspect.getmembers(type(environment), predicate=inspect.isfunction)
    names = [name for name, _ in members if not name.startswith("_") and name not in ("reset", "get_reward")]
    return [getattr(environment, name) for name in names]


def tool_schemas(environment_class: type) -> list[dict]:
    """JSON schemas of the tools of an environment class: the very ones TRL renders during RL."""
    return list(_cached_schemas(environment_class))


@lru_cache
def _cached_schemas(environment_class: type) -> tuple[dict, ...]:
    return tuple(get_json_schema(method) for method in tool_methods(environment_class()))


def tool_call(name: str, **arguments: Any) -> Message:
    """An assistant turn that calls one tool."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def settings_from(cls: type[T], task: str, settings: dict[str, Any]) -> T:
    """Build the settings dataclass `cls`, refusing an unknown key or a value of another type by name."""
    hints = _cached_hints(cls)  # type: ignore[arg-type]
    fitting = {}
    for key, value in settings.items():
        if key not in hints:
            raise UserError(f"settings of task {task}: unknown key {key!r}; known keys are {', '.join(hints)}")
        try:
            fitting[key] = fit(value, hints[key])
        except ValueError as error:
            raise UserError(f"settings of task {task}: {key}: {error}") from None
    return cls(**fitting)


@lru_cache
def _cached_hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def refuse_unknown_settings(task: Task, settings: object) -> None:
    """Refuse what a task's functions do not take as keyword arguments; those that take any check them themselves.

    Raises:
        UserError: naming the task and the key.
    """
    if not isinstance(settings, dict):
        raise UserError(f"task_settings: {task.name}: {settings!r} needs a mapping, for instance {{max_number: 9}}")
    parameters = inspect.signature(task.prompt).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters if parameter.name not in ("seed", "split")]
    for key in settings:
        if key not in known:
            takes = f"known keys are {', '.join(known)}" if known else "this task takes no settings"
            raise UserError(f"task_settings: {task.name}: unknown key {key!r}; {takes}")


def split_of(instance: str) -> Split:
    """The split an instance belongs to, from its own text: no seed can bring a test instance into training.

    That is worth as much as the text tells instances apart: in tic-tac-toe two that differ may be the same game.
    """
    digest = hashlib.sha256(instance.encode()).digest()
    return "test" if digest[0] % TEST_FRACTION_INVERSE == 0 else "train"


def draw_instance(
    task: str, seed: int, split: Split, draw: Callable[[random.Random], T | None], key: Callable[[T], str]
) -> tuple[T, random.Random]:
    """Draw instances from one seeded stream until one is valid (not None) and belongs to `split`.

    Returns the instance and the stream, for the choices that are not part of the instance (its wording).

    Raises:
        UserError: `split` is unknown, or the settings admit (almost) no instance of it.
    """
    if split not in ("train", "test"):
        raise UserError(f"task {task}: split is {split!r}; use 'train' or 'test'")
    rng = random.Random(f"{task}/{split}/{seed}")
    for _ in range(MAX_DRAWS):
        instance = draw(rng)
        if instance is not None and split_of(key(instance)) == split:
            return instance, rng
    raise UserError(f"settings of task {task}: no {split} instance in {MAX_DRAWS} draws; widen the settings")
