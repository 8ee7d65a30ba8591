"""The calculator tool: right values, clear refusals, nothing dangerous or unbounded."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamba.tools import CalculatorError, calculator, evaluate, format_number


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("5 + 3", "8.0"),
        ("12 + 7 / 2", "15.5"),
        ("2 ** 3 ** 2", "512.0"),
        ("(2 ** 3) ** 2", "64.0"),
        ("2 * 3 ^ 2", "18.0"),
        ("6 × 7 ÷ 2 − 1", "20.0"),
        ("(-5) + 3", "-2.0"),
        ("-2 ** 2", "-4.0"),
        ("1 / 3", "0.3333"),
        ("sqrt(16) + log(e) + sin(0) + cos(0)", "6.0"),
        ("  7 ", "7.0"),
        ("0 * (-1)", "0.0"),
    ],
)
def test_values(expression: str, expected: str) -> None:
    assert calculator(expression) == expected


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("1 / 0", "error: division by zero"),
        ("0 ** (-1)", "error: division by zero"),
        ("log(0)", "error: log of 0.0 is undefined"),
        ("sqrt(-4)", "error: sqrt of -4.0 is undefined"),
        ("(-8) ** 0.5", "error: the result is not a real number"),
        ("9 ** 9 ** 9 ** 9", "error: the result is too large"),
        ("1e308 * 10", "error: the result is too large"),
        ("9" * 400, "error: the result is too large"),
        ("2 +", "error: not a valid expression"),
        ("", "error: not a valid expression"),
        ("\0", "error: not a valid expression"),
        ("1" * 501, "error: the expression is longer than 500 characters"),
        ("(" * 240 + "1" + ")" * 240, "error: not a valid expression"),
        ("__import__('os')", "error: cannot use '__import__('os')'"),
        ("x + 1", "error: cannot use 'x'"),
        ("'a' * 3", "error: cannot use ''a''"),
        ("True + 1", "error: cannot use 'True'"),
        ("(1).real", "error: cannot use '1 .real'"),
        ("log(2, 3)", "error: cannot use 'log(2, 3)'"),
        ("[1][0]", "error: cannot use '[1][0]'"),
        ("1 if 1 else 2", "error: cannot use '1 if 1 else 2'"),
        ("f\"{'\u200b'}\"", "error: cannot use "),
        ("1 + f\"{'\x07'}\"", "error: cannot use "),
    ],
)
def test_refusals_say_why(expression: str, message: str) -> None:
    assert calculator(expression).startswith(message)


def test_refuses_what_is_not_text() -> None:
    assert calculator(5) == "error: the expression must be text"  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_answered(text: str) -> None:
    answer = calculator(text)
    assert answer.startswith("error: ") or math.isfinite(float(answer))


@settings(deadline=None)
@given(st.floats(min_value=-1e6, max_value=1e6))
def test_format_is_short_and_close(value: float) -> None:
    text = format_number(value)
    assert abs(float(text) - value) <= 5.1e-5
    assert "e" not in text and text != "-0.0"
    assert 1 <= len(text.split(".")[1]) <= 4


def test_evaluate_raises_with_a_reason() -> None:
    with pytest.raises(CalculatorError, match="division by zero"):
        evaluate("3 / (2 - 2)")
