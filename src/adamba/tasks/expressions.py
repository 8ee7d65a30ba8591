"""Arithmetic expression trees: random ones, their value, and their text in symbols or in words.

`symbols` prints brackets exactly where the tree needs them, so parsing the text gives the tree back; a unary minus
stands in brackets of its own.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from adamba.tools.calculator import FUNCTIONS, CalculatorError, evaluate

INFIX = ("+", "-", "*", "/", "**")
OPERATORS = (*INFIX, *FUNCTIONS, "neg")
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "**": 3}
ATOM = 4  # numbers, function calls and the bracketed unary minus
RIGHT_ASSOCIATIVE = ("**",)
INFIX_WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by", "**": "to the power of"}
FUNCTION_WORDS = {
    "log": "the natural logarithm of",
    "sqrt": "the square root of",
    "sin": "the sine of",
    "cos": "the cosine of",
}


@dataclass(frozen=True)
class Number:
    """A leaf: a non-negative number, kept as the text it is written with."""

    text: str


@dataclass(frozen=True)
class Operation:
    """An inner node: one of `OPERATORS` with its one or two operands."""

    operator: str
    operands: "tuple[Tree, ...]"


Tree = Number | Operation


def symbols(tree: Tree) -> str:
    """Text the calculator reads, e.g. `12 + 7 / 2` or `(2 + 3) ** 2 * sqrt(16)`."""
    match tree:
        case Number(text):
            return text
        case Operation("neg", (operand,)):
            inner = symbols(operand)
            return f"(-({inner}))" if _precedence(operand) < ATOM else f"(-{inner})"
        case Operation(operator, (operand,)):
            return f"{operator}({symbols(operand)})"
        case Operation(operator, (left, right)):
            left_text, right_text = symbols(left), symbols(right)
            left_text = f"({left_text})" if _needs_brackets(operator, left, right_side=False) else left_text
            right_text = f"({right_text})" if _needs_brackets(operator, right, right_side=True) else right_text
            return f"{left_text} {operator} {right_text}"
    raise TypeError(f"not a tree: {tree!r}")


def words(tree: Tree, nothing_follows: bool = True) -> str:
    """Text in words where they are unambiguous by precedence, in symbols elsewhere.

    A function is spoken (`the square root of 16`) only when its operand is a number and no operator follows it:
    "the square root of 16 plus 9" could be heard in two ways, `sqrt(16) plus 9` could not.
    """
    match tree:
        case Operation(operator, (left, right)):
            bracketed_left = _needs_brackets(operator, left, right_side=False)
            bracketed_right = _needs_brackets(operator, right, right_side=True)
            left_text = f"({words(left)})" if bracketed_left else words(left, nothing_follows=False)
            right_text = f"({words(right)})" if bracketed_right else words(right, nothing_follows)
            return f"{left_text} {INFIX_WORDS[operator]} {right_text}"
        case Operation(operator, (Number(text),)) if operator in FUNCTION_WORDS and nothing_follows:
            return f"{FUNCTION_WORDS[operator]} {text}"
    return symbols(tree)


def value(tree: Tree, max_abs: float) -> float:
    """Value of the tree.

    Raises:
        CalculatorError: a node is undefined, complex, or beyond `max_abs` in magnitude.
    """
    if isinstance(tree, Operation):
        for operand in tree.operands:
            value(operand, max_abs)
    result = evaluate(symbols(tree))
    if abs(result) > max_abs:
        raise CalculatorError("the result is too large")
    return result


def random_tree(
    rng: random.Random,
    *,
    depth: int,
    max_number: int,
    decimal_fraction: float,
    operator_weights: Mapping[str, float],
) -> Tree:
    """A random tree exactly `depth` operators deep (0 gives a number).

    Numbers have any number of digits up to those of `max_number` equally often, so that small ones are not rare;
    `decimal_fraction` of them get one or two decimals. Exponents are small whole numbers, for a result in range.
    """

    def grow(levels: int) -> Tree:
        if levels == 0:
            return random_number(rng, max_number, decimal_fraction)
        operator = rng.choices(list(operator_weights), weights=list(operator_weights.values()))[0]
        deep = grow(levels - 1)
        if operator not in INFIX:
            return Operation(operator, (deep,))
        if operator == "**":
            return Operation(operator, (deep, Number(str(rng.randint(0, 4)))))
        other = grow(rng.randint(0, levels - 1))
        return Operation(operator, (deep, other) if rng.random() < 0.5 else (other, deep))

    return grow(depth)


def random_number(rng: random.Random, max_number: int, decimal_fraction: float) -> Number:
    """A number in [0, max_number], whole or with one or two decimals (never a trailing zero)."""
    num_digits = rng.randint(1, len(str(max_number)))
    whole = rng.randint(0, min(max_number, 10**num_digits - 1))
    if rng.random() >= decimal_fraction or whole == max_number:
        return Number(str(whole))
    if rng.random() < 0.5:
        return Number(f"{whole}.{rng.randint(1, 9)}")
    return Number(f"{whole}.{rng.randint(0, 9)}{rng.randint(1, 9)}")


def _precedence(tree: Tree) -> int:
    return PRECEDENCE.get(tree.operator, ATOM) if isinstance(tree, Operation) else ATOM


def _needs_brackets(operator: str, operand: Tree, *, right_side: bool) -> bool:
    mine, its = PRECEDENCE[operator], _precedence(operand)
    groups_with_me = right_side == (operator in RIGHT_ASSOCIATIVE)
    return its < mine or (its == mine and not groups_with_me)
