"""Code: write `solve(xs)` to a specification in words; it is run, in the sandbox, on inputs that the model never sees.

    Write solve(xs) in Python. It returns the sum of the squares of the even numbers in xs.   →
    Example: solve([1, 2]) is 4.
    submit("def solve(xs):\\n    return …")  →  All 8 tests pass.  →  Solved.

The expected results stay in this process and only plain data comes back, so nothing can be read, patched or faked.
The role is the coder's; a tester would act on the same state (`_observation`) by another tool.
(The module is not named `code`, which is the standard library's.)
"""

import json
import random
import secrets
from dataclasses import dataclass
from typing import Any

from adamba.errors import UserError
from adamba.tasks.code_rules import Specification, random_inputs, random_specification
from adamba.tasks.task import Message, Row, Split, Task, draw_instance, settings_from, tool_call, tool_schemas
from adamba.tools.code_interpreter import MAX_CHARACTERS, interpret
from adamba.tools.sandbox import Isolation, Limits, require, run_python

NAME = "code"
PHRASING = "Write solve(xs) in Python. It returns {}.\nExample: solve({}) is {}."
MAX_SUBMISSIONS = 3
MAX_RUNS = 4
FAILED_SUBMISSION_PENALTY = 0.1
MAX_PARTIAL_CREDIT = 0.2
SOLVED, NOT_SOLVED = "Solved.", "Not solved."
LIMITS = Limits(wall_seconds=10.0, cpu_seconds=2)  # wall time is generous: the machine may be busy training

# What follows the model's code: each result as JSON, the last line of the output.
HARNESS = """

import json as _json
def _result(xs):
    try:
        return _json.loads(_json.dumps(solve(xs)))
    except Exception:
        return None
print(); print("{marker}" + _json.dumps([_result(xs) for xs in {inputs}]))
"""


@dataclass(frozen=True)
class CodeSettings:
    """Settings of the code task.

    Attributes:
        num_tests: Hidden inputs (3 to 50).
        isolation: `required`: refuse to run where the machine cannot isolate code; `none`: run it unprotected.
    """

    num_tests: int = 8
    isolation: Isolation = "required"

    def __post_init__(self) -> None:
        if not 3 <= self.num_tests <= 50:
            raise UserError(f"settings of task {NAME}: num_tests is {self.num_tests}; use 3 to 50")


@dataclass(frozen=True)
class Instance:
    """A specification, one input shown and those that are not."""

    specification: Specification
    shown: list[int]
    inputs: list[list[int]]


class CodeEnvironment:
    """One specification; the model may run code, and hands in its function."""

    def __init__(self) -> None:
        self._begin("", [], [], "required")

    def reset(
        self, specification: str, test_inputs: str, test_results: str, isolation: Isolation, **row: object
    ) -> None:
        """Start the problem of a `prompt` row; the prompt is complete, so nothing is added to it.

        Raises:
            UserError: isolation is required and this machine has none.
        """
        require(isolation)
        self._begin(specification, json.loads(test_inputs), json.loads(test_results), isolation)

    def _begin(self, specification: str, inputs: list, expected: list, isolation: Isolation) -> None:
        self._specification, self._inputs, self._expected, self._isolation = specification, inputs, expected, isolation
        self._submitted = ""
        self._passed = 0
        self._submissions = 0
        self._runs = 0
        self._refused_calls = 0

    def code_interpreter(self, code: str) -> str:
        """Run Python code and get what it prints.

        Args:
            code: Like print(2 + 3).
        """
        if self._runs >= MAX_RUNS or self._done:
            self._refused_calls += 1
            return "error: no runs left, submit now"
        self._runs += 1
        return interpret(code, LIMITS, self._isolation)[0]

    def submit(self, code: str) -> str:
        """Hand in the function; hidden tests check it.

        Args:
            code: Like def solve(xs): ...
        """
        if self._done:
            self._refused_calls += 1
            return f"It is over. {self._result_text()}"
        if not isinstance(code, str) or not code.strip() or len(code) > MAX_CHARACTERS:
            self._refused_calls += 1
            return f"error: the code must be text of 1 to {MAX_CHARACTERS} characters"
        self._submissions += 1
        self._submitted = code
        self._passed, problem = run_tests(code, self._inputs, self._expected, self._isolation)
        text = f"{self._passed} of {len(self._inputs)} tests pass."
        if problem:
            text += f" error: {problem}"
        return f"{text} {self._result_text()}" if self._done else text

    @property
    def _done(self) -> bool:
        return self._is_solved() or self._submissions >= MAX_SUBMISSIONS

    def _is_solved(self) -> bool:
        return bool(self._inputs) and self._passed == len(self._inputs)

    def _result_text(self) -> str:
        return SOLVED if self._is_solved() else NOT_SOLVED

    def _observation(self) -> str:
        """The state as any role reads it: what is asked, what was handed in last, and how it fared."""
        if not self._submissions:
            return self._specification
        return f"{self._specification}\n{self._submitted}\n{self._passed} of {len(self._inputs)} tests pass."

    def _score(self) -> float:
        """1 for all tests at the first submission; else most for the share that the last one passes."""
        if not self._submissions:
            return 0.0
        base = 1.0 if self._is_solved() else MAX_PARTIAL_CREDIT * self._passed / len(self._inputs)
        failed = self._submissions - self._is_solved()
        return max(0.0, base - FAILED_SUBMISSION_PENALTY * failed)

    def _outcome(self, final_text: str = "") -> dict[str, float]:
        """Score the episode; the tests alone decide `score`, the assistant's last text only `well_formed`."""
        return {
            "score": self._score(),
            "well_formed": float(self._done and final_text.strip() == self._result_text()),
            "solved": float(self._is_solved()),
            "valid_calls": float(self._submissions + self._runs),
            "invalid_calls": float(self._refused_calls),
            "good_calls": float(self._is_solved()),
            "best_calls": 1.0,
        }


def run_tests(code: str, inputs: list, expected: list, isolation: Isolation) -> tuple[int, str]:
    """How many of `inputs` give what is `expected`, and what went wrong when the code did not run to its end."""
    marker = secrets.token_hex(8)
    result = run_python(code + HARNESS.format(marker=marker, inputs=inputs), LIMITS, isolation)
    lines = result.output.rstrip("\n").rsplit("\n", 1)
    if not lines[-1].startswith(marker):
        return 0, result.error or "the tests did not run to their end"
    try:
        got = json.loads(lines[-1].removeprefix(marker))
    except (ValueError, RecursionError):
        return 0, "the results cannot be read"
    if not isinstance(got, list) or len(got) != len(expected):
        return 0, "the results cannot be read"
    return sum(_same(one, other) for one, other in zip(got, expected, strict=True)), ""


def _same(got: Any, expected: Any) -> bool:
    """Equal in value and in type: True is not 1, and 1.0 is not 1."""
    if isinstance(expected, list):
        return isinstance(got, list) and len(got) == len(expected) and all(map(_same, got, expected))
    return type(got) is type(expected) and got == expected


def prompt(seed: int, split: Split, **settings: object) -> Row:
    """One specification with its hidden tests, for RL and evaluation."""
    config = settings_from(CodeSettings, NAME, settings)
    instance, _ = _instance(seed, split, config)
    specification = instance.specification
    text = PHRASING.format(specification.words, instance.shown, specification.function(instance.shown))
    return {
        "prompt": [{"role": "user", "content": text}],
        "environment": NAME,
        "seed": seed,
        "split": split,
        "specification": text,
        "test_inputs": json.dumps(instance.inputs),
        "test_results": json.dumps([specification.function(xs) for xs in instance.inputs]),
        "isolation": config.isolation,
    }


def example(seed: int, split: Split, **settings: object) -> Row:
    """One conversation as the solver holds it. No code is run: what the tests say of it is known."""
    config = settings_from(CodeSettings, NAME, settings)
    instance, _ = _instance(seed, split, config)
    count = len(instance.inputs)
    turns: list[Message] = [
        tool_call("submit", code=instance.specification.solution),
        {"role": "tool", "name": "submit", "content": f"{count} of {count} tests pass. {SOLVED}"},
        {"role": "assistant", "content": SOLVED},
    ]
    return {"messages": [*prompt(seed, split, **settings)["prompt"], *turns], "tools": tool_schemas(CodeEnvironment)}


def preference(seed: int, split: Split, **settings: object) -> Row:
    """The solution against that of another specification, which fails on one of the hidden inputs."""
    config = settings_from(CodeSettings, NAME, settings)
    instance, rng = _instance(seed, split, config)
    right = instance.specification
    while True:
        other = random_specification(rng)
        if any(not _same(other.function(xs), right.function(xs)) for xs in instance.inputs):
            break
    return {
        "prompt": prompt(seed, split, **settings)["prompt"],
        "chosen": [tool_call("submit", code=right.solution)],
        "rejected": [tool_call("submit", code=other.solution)],
        "tools": tool_schemas(CodeEnvironment),
    }


def _instance(seed: int, split: Split, config: CodeSettings) -> tuple[Instance, random.Random]:
    return draw_instance(NAME, seed, split, lambda rng: _draw(rng, config), lambda drawn: drawn.specification.words)


def _draw(rng: random.Random, config: CodeSettings) -> Instance | None:
    specification = random_specification(rng)
    shown, inputs = random_inputs(rng, 2)[1], random_inputs(rng, config.num_tests)
    # A constant must not pass most tests, nor the list itself.
    results = [json.dumps(specification.function(xs)) for xs in inputs]
    if len(set(results)) < len(results) // 2 or results == [json.dumps(xs) for xs in inputs]:
        return None
    return Instance(specification, shown, inputs)


CODE = Task(name=NAME, environments={NAME: CodeEnvironment}, example=example, prompt=prompt, preference=preference)
