"""A calculator that evaluates one arithmetic expression safely: parsed by `ast`, walked by hand, never `eval`uated."""

import ast
import math
import operator
from collections.abc import Callable

MAX_CHARACTERS = 500  # keeps the parser's recursion and the walk bounded, whatever the model sends
DECIMALS = 4

BINARY: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
UNARY: dict[type[ast.unaryop], Callable[[float], float]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
FUNCTIONS: dict[str, Callable[[float], float]] = {
    "log": math.log,
    "sqrt": math.sqrt,
    "sin": math.sin,
    "cos": math.cos,
}
CONSTANTS = {"pi": math.pi, "e": math.e}
SYNONYMS = str.maketrans({"^": "**", "×": "*", "÷": "/", "−": "-"})


class CalculatorError(ValueError):
    """The expression has no value; the message says why in a few words."""


def format_number(value: float) -> str:
    """Write `value` with at most four decimals and at least one: `8.0`, `15.5`, `0.3333`; never `-0.0`."""
    return str(round(float(value), DECIMALS) + 0.0)


def evaluate(expression: str) -> float:
    """Value of `expression`, computed in floats (so no power can grow beyond 1e308).

    Knows `+ - * / **`, brackets, `log` (natural), `sqrt`, `sin`, `cos` (radians), `pi` and `e`; `^ × ÷ −` are read as
    `** * / -`.

    Raises:
        CalculatorError: not such an expression, longer than 500 characters, or without a finite real value.
    """
    if not isinstance(expression, str):
        raise CalculatorError("the expression must be text")
    if len(expression) > MAX_CHARACTERS:
        raise CalculatorError(f"the expression is longer than {MAX_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.translate(SYNONYMS).strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise CalculatorError("not a valid expression") from None
    try:
        value = _value(tree.body)
    except ZeroDivisionError:
        raise CalculatorError("division by zero") from None
    except OverflowError:
        raise CalculatorError("the result is too large") from None
    except RecursionError:
        raise CalculatorError("the expression is nested too deeply") from None
    if not math.isfinite(value):
        raise CalculatorError("the result is too large")
    return value


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return float(number)
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            return UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            result = BINARY[type(op)](_value(left), _value(right))
            if isinstance(result, complex):
                raise CalculatorError("the result is not a real number")
            return result
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in FUNCTIONS:
            value = _value(argument)
            try:
                return FUNCTIONS[name](value)
            except ValueError:
                raise CalculatorError(f"{name} of {format_number(value)} is undefined") from None
    raise CalculatorError(f"cannot use {_describe(node)}")


def _describe(node: ast.expr) -> str:
    try:
        return f"'{ast.unparse(node)[:40]}'"
    except ValueError:  # some f-strings cannot be written again
        return "this"


def calculator(expression: str) -> str:
    """Evaluate an expression.

    Args:
        expression: Like 2 * (3 + 4).
    """
    try:
        return format_number(evaluate(expression))
    except CalculatorError as error:
        return f"error: {error}"
