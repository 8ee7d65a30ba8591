"""Calculator: a random expression is asked in words or symbols, one tool call evaluates it, the answer quotes it.

    What is 12 plus 7 divided by 2?  →  calculator("12 + 7 / 2") → 15.5  →  12 + 7 / 2 # Answer: "15.5"

With `tool_free: true` the assistant answers at once.
"""

import random
import re
from dataclasses import dataclass, field
from functools import partial

from adamba.errors import UserError
from adamba.tasks.expressions import OPERATORS, Tree, random_tree, symbols, value, words
from adamba.tasks.task import Message, Row, Split, Task, draw_instance, settings_from, tool_call, tool_schemas
from adamba.tools.calculator import CalculatorError, calculator, format_number

NAME = "calculator"
TOOL_FREE_NAME = "calculator_tool_free"
PHRASINGS = (
    "Calculate {}?",
    "What is {}?",
    "Compute {}.",
    "How much is {}?",
    "Evaluate {}",
    "{} = ?",
    "Please calculate {}.",
    "Tell me the value of {}.",
)
ANSWER = re.compile(r'# Answer: "(-?\d{1,20}\.\d{1,4})"')
MAX_CALLS = 4  # an episode needs one; more than this only stalls
MAX_ABS_RESULT = 1e15
MAX_WRONG_DRAWS = 50
MAX_DEPTH = 16  # a level makes a tree half as large again, and deeper ones hardly ever fit what the calculator reads
TOLERANCE = 1e-6  # answers have four decimals, so two different ones differ by 1e-4


@dataclass(frozen=True)
class CalculatorSettings:
    """Settings of the calculator task.

    Attributes:
        min_depth: Smallest depth of the expression tree (1 is one operator).
        max_depth: Largest depth of the expression tree (at most 16).
        max_number: Largest number in an expression.
        decimal_fraction: Share of the numbers with one or two decimals.
        word_fraction: Share of the questions in words.
        max_abs_result: Largest magnitude of the result and of every intermediate result.
        operator_weights: Relative weight of each of `+ - * / ** log sqrt sin cos neg`; absent means never.
        tool_free: No tool: the assistant answers at once.
    """

    min_depth: int = 1
    max_depth: int = 3
    max_number: int = 999
    decimal_fraction: float = 0.3
    word_fraction: float = 0.4
    max_abs_result: float = 1e6
    operator_weights: dict[str, float] = field(
        default_factory=lambda: {
            **{"+": 4.0, "-": 3.0, "*": 3.0, "/": 2.0, "**": 0.6},
            **{"log": 0.4, "sqrt": 0.4, "sin": 0.4, "cos": 0.4, "neg": 0.4},
        }
    )
    tool_free: bool = False

    def __post_init__(self) -> None:
        for name in self.operator_weights:
            if name not in OPERATORS:
                raise UserError(
                    f"settings of task {NAME}: operator_weights has {name!r}; known operators are "
                    f"{', '.join(OPERATORS)}"
                )
        if min(self.operator_weights.values(), default=0) < 0 or not any(self.operator_weights.values()):
            raise UserError(
                f"settings of task {NAME}: operator_weights {self.operator_weights} are negative or all zero"
            )
        if not 1 <= self.min_depth <= self.max_depth:
            raise UserError(
                f"settings of task {NAME}: min_depth {self.min_depth} and max_depth {self.max_depth} must satisfy "
                "1 <= min_depth <= max_depth"
            )
        if self.max_depth > MAX_DEPTH:
            raise UserError(f"settings of task {NAME}: max_depth is {self.max_depth}; use at most {MAX_DEPTH}")
        if not 0 < self.max_abs_result <= MAX_ABS_RESULT:
            raise UserError(
                f"settings of task {NAME}: max_abs_result is {self.max_abs_result:g}; use above 0, at most "
                f"{MAX_ABS_RESULT:g}, beyond which an answer has an exponent"
            )
        if self.max_number < 1:
            raise UserError(f"settings of task {NAME}: max_number is {self.max_number}; use 1 or more")


class ToolFreeCalculatorEnvironment:
    """An episode without tools: the outcome depends on the final text alone."""

    _best_calls = 0

    def __init__(self) -> None:
        self.reset(expression="", answer="")

    def reset(self, expression: str, answer: str, **row: object) -> None:
        """Start the episode of a `prompt` row; the prompt is complete, so nothing is added to it."""
        self._expression = expression
        self._answer = answer
        self._valid_calls = 0
        self._invalid_calls = 0

    @property
    def _done(self) -> bool:
        return False  # a text without a call ends the episode, nothing else

    def _outcome(self, final_text: str = "") -> dict[str, float]:
        """Score the episode from the assistant's last text."""
        found = ANSWER.findall(final_text)
        # Exactly one answer: a list of guesses must not win by containing the right one.
        correct = len(found) == 1 and bool(self._answer) and abs(float(found[0]) - float(self._answer)) < TOLERANCE
        return {
            "score": float(correct),
            "well_formed": float(bool(found) and final_text.strip() == final_answer(self._expression, found[0])),
            "valid_calls": float(self._valid_calls),
            "invalid_calls": float(self._invalid_calls),
            "best_calls": float(self._best_calls),
        }


class CalculatorEnvironment(ToolFreeCalculatorEnvironment):
    """An episode with the calculator tool."""

    _best_calls = 1

    def calculator(self, expression: str) -> str:
        """Evaluate an expression.

        Args:
            expression: Like 2 * (3 + 4).
        """
        if self._valid_calls + self._invalid_calls >= MAX_CALLS:
            self._invalid_calls += 1
            return "error: no calls left, answer now"
        result = calculator(expression)
        if result.startswith("error"):
            self._invalid_calls += 1
        else:
            self._valid_calls += 1
        return result


def final_answer(expression: str, answer: str) -> str:
    """The assistant's last turn."""
    return f'{expression} # Answer: "{answer}"'


def prompt(seed: int, split: Split, **settings: object) -> Row:
    """One question with its expression and answer, for RL and evaluation."""
    config = settings_from(CalculatorSettings, NAME, settings)
    drawn: tuple[Tree, random.Random] = draw_instance(NAME, seed, split, partial(_draw, config=config), symbols)
    tree, rng = drawn
    question = words(tree) if rng.random() < config.word_fraction else symbols(tree)
    return {
        "prompt": [{"role": "user", "content": rng.choice(PHRASINGS).format(question)}],
        "environment": TOOL_FREE_NAME if config.tool_free else NAME,
        "seed": seed,
        "split": split,
        "expression": symbols(tree),
        "answer": calculator(symbols(tree)),
    }


def example(seed: int, split: Split, **settings: object) -> Row:
    """One conversation as the solver holds it."""
    row = prompt(seed, split, **settings)
    expression, answer = row["expression"], row["answer"]
    last: Message = {"role": "assistant", "content": final_answer(expression, answer)}
    if row["environment"] == TOOL_FREE_NAME:
        return {"messages": [*row["prompt"], last], "tools": []}
    return {
        "messages": [*row["prompt"], *_call_and_result(expression, answer), last],
        "tools": tool_schemas(CalculatorEnvironment),
    }


def preference(seed: int, split: Split, **settings: object) -> Row:
    """The solver's turn against a wrong one: another expression in the call, or another number in the answer."""
    row = prompt(seed, split, **settings)
    rng = random.Random(f"{NAME}/preference/{split}/{seed}")
    expression, answer, tool_free = row["expression"], row["answer"], row["environment"] == TOOL_FREE_NAME
    shows_call = not tool_free and rng.random() < 0.5
    wrong = _wrong_expression(expression, answer, rng) if shows_call else None
    if wrong is not None:
        return {
            "prompt": row["prompt"],
            "chosen": [tool_call("calculator", expression=expression)],
            "rejected": [tool_call("calculator", expression=wrong)],
            "tools": tool_schemas(CalculatorEnvironment),
        }
    history = [] if tool_free else _call_and_result(expression, answer)
    return {
        "prompt": [*row["prompt"], *history],
        "chosen": [{"role": "assistant", "content": final_answer(expression, answer)}],
        "rejected": [{"role": "assistant", "content": final_answer(expression, _change_digit(answer, rng))}],
        "tools": [] if tool_free else tool_schemas(CalculatorEnvironment),
    }


def _draw(rng: random.Random, config: CalculatorSettings) -> Tree | None:
    tree = random_tree(
        rng,
        depth=rng.randint(config.min_depth, config.max_depth),
        max_number=config.max_number,
        decimal_fraction=config.decimal_fraction,
        operator_weights=config.operator_weights,
    )
    try:
        result = value(tree, config.max_abs_result)
    except CalculatorError:
        return None
    # A tiny result would be written as 0.0, which is not its value.
    return None if result != 0 and format_number(result) == "0.0" else tree


def _call_and_result(expression: str, answer: str) -> list[Message]:
    return [
        tool_call("calculator", expression=expression),
        {"role": "tool", "name": "calculator", "content": answer},
    ]


def _wrong_expression(expression: str, answer: str, rng: random.Random) -> str | None:
    """The expression with one digit replaced and another value, or without one; None where none is found (0 * 0)."""
    drawn = (_change_digit(expression, rng) for _ in range(MAX_WRONG_DRAWS))
    return next((wrong for wrong in drawn if calculator(wrong) != answer), None)


def _change_digit(text: str, rng: random.Random) -> str:
    """The text with one digit replaced by another."""
    position = rng.choice([index for index, character in enumerate(text) if character.isdigit()])
    digit = rng.choice([digit for digit in "123456789" if digit != text[position]])
    return text[:position] + digit + text[position + 1 :]


CALCULATOR = Task(
    name=NAME,
    environments={NAME: CalculatorEnvironment, TOOL_FREE_NAME: ToolFreeCalculatorEnvironment},
    example=example,
    prompt=prompt,
    preference=preference,
)
