"""Math: a word problem or an expression over whole numbers, one tool call computes it, the answer is the number.

    Anna has 12 apples. Then come 3 bags of 4 apples each. …  →  calculator("12 + 3 * 4") → 24.0  →  Answer: 24

(The module is not named `math`, which is the standard library's.)
"""

import random
import re
from dataclasses import dataclass

from adamba.errors import UserError
from adamba.tasks.calculator import CalculatorEnvironment
from adamba.tasks.expressions import symbols
from adamba.tasks.math_rules import Problem, random_expression, random_problem
from adamba.tasks.task import Message, Row, Split, Task, draw_instance, settings_from, tool_call, tool_schemas
from adamba.tools.calculator import calculator

NAME = "math"
# No digit may follow: neither `24,000` nor `24 or 25` is the answer 24.
ANSWER = re.compile(r"Answer: (-?\d{1,18})(?![.%])\D*\Z")
MAX_VALUE = 10**6


@dataclass(frozen=True)
class MathSettings:
    """Settings of the math task.

    Attributes:
        min_steps: Events of a story, or operators of an expression, at least.
        max_steps: The same, at most (8).
        max_number: Largest number in a problem.
        expression_fraction: Share of the problems that are plain expressions.
    """

    min_steps: int = 1
    max_steps: int = 3
    max_number: int = 20
    expression_fraction: float = 0.25

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps <= 8:
            raise UserError(
                f"settings of task {NAME}: min_steps {self.min_steps} and max_steps {self.max_steps} must satisfy "
                "1 <= min_steps <= max_steps <= 8"
            )
        if self.max_number < 2:
            raise UserError(f"settings of task {NAME}: max_number is {self.max_number}; use 2 or more")
        if not 0 <= self.expression_fraction <= 1:
            raise UserError(
                f"settings of task {NAME}: expression_fraction is {self.expression_fraction}; use 0 up to 1"
            )


class MathEnvironment(CalculatorEnvironment):
    """An episode with the calculator tool; the final text holds the answer, a whole number."""

    def _outcome(self, final_text: str = "") -> dict[str, float]:
        """Score the episode from the assistant's last text."""
        found = ANSWER.findall(final_text)
        # Exactly one answer: a list of guesses must not win by containing the right one.
        correct = final_text.count("Answer:") == 1 and found == [self._answer]
        return {
            "score": float(correct),
            "well_formed": float(bool(found) and final_text.strip() == f"Answer: {found[0]}"),
            "valid_calls": float(self._valid_calls),
            "invalid_calls": float(self._invalid_calls),
            "best_calls": float(self._best_calls),
        }


def prompt(seed: int, split: Split, **settings: object) -> Row:
    """One problem with its expression and answer, for RL and evaluation."""
    config = settings_from(MathSettings, NAME, settings)
    problem, _ = draw_instance(NAME, seed, split, lambda rng: _draw(rng, config), lambda drawn: symbols(drawn.tree))
    return {
        "prompt": [{"role": "user", "content": problem.question}],
        "environment": NAME,
        "seed": seed,
        "split": split,
        "expression": symbols(problem.tree),
        "answer": str(problem.value),
    }


def example(seed: int, split: Split, **settings: object) -> Row:
    """One conversation as the solver holds it."""
    row = prompt(seed, split, **settings)
    last = {"role": "assistant", "content": f"Answer: {row['answer']}"}
    return {
        "messages": [*row["prompt"], *_call_and_result(row["expression"]), last],
        "tools": tool_schemas(MathEnvironment),
    }


def preference(seed: int, split: Split, **settings: object) -> Row:
    """The solver's turn against a wrong one: another number in the call, or in the answer."""
    row = prompt(seed, split, **settings)
    rng = random.Random(f"{NAME}/preference/{split}/{seed}")
    off = rng.choice([-2, -1, 1, 2])
    if rng.random() < 0.5:
        numbers = list(re.finditer(r"\d+", row["expression"]))
        changed = rng.choice(numbers)
        number = int(changed[0]) + abs(off)
        wrong = row["expression"][: changed.start()] + str(number) + row["expression"][changed.end() :]
        return {
            "prompt": row["prompt"],
            "chosen": [tool_call("calculator", expression=row["expression"])],
            "rejected": [tool_call("calculator", expression=wrong)],
            "tools": tool_schemas(MathEnvironment),
        }
    return {
        "prompt": [*row["prompt"], *_call_and_result(row["expression"])],
        "chosen": [{"role": "assistant", "content": f"Answer: {row['answer']}"}],
        "rejected": [{"role": "assistant", "content": f"Answer: {int(row['answer']) + off}"}],
        "tools": tool_schemas(MathEnvironment),
    }


def _draw(rng: random.Random, config: MathSettings) -> Problem | None:
    steps = rng.randint(config.min_steps, config.max_steps)
    if rng.random() < config.expression_fraction:
        problem: Problem | None = random_expression(rng, steps, config.max_number)
    else:
        problem = random_problem(rng, steps, config.max_number)
    return problem if problem is not None and abs(problem.value) <= MAX_VALUE else None


def _call_and_result(expression: str) -> list[Message]:
    return [
        tool_call("calculator", expression=expression),
        {"role": "tool", "name": "calculator", "content": calculator(expression)},
    ]


MATH = Task(name=NAME, environments={NAME: MathEnvironment}, example=example, prompt=prompt, preference=preference)
