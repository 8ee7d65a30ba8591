"""Expression trees: the text means the tree, in symbols and in words, with no bracket too many."""

import ast
import random
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from adamba.tasks.expressions import (
    FUNCTION_WORDS,
    INFIX,
    INFIX_WORDS,
    OPERATORS,
    Number,
    Operation,
    Tree,
    random_number,
    random_tree,
    symbols,
    words,
)
from adamba.tools.calculator import FUNCTIONS

numbers = st.integers(0, 999).map(lambda number: Number(str(number)))
trees = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.builds(lambda op, a, b: Operation(op, (a, b)), st.sampled_from(INFIX), inner, inner),
        st.builds(lambda op, a: Operation(op, (a,)), st.sampled_from([*FUNCTIONS, "neg"]), inner),
    ),
    max_leaves=10,
)
PYTHON = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}


def parse(text: str) -> Tree:
    """The tree of a text, by Python's own grammar."""

    def convert(node: ast.expr) -> Tree:
        match node:
            case ast.Constant(value=number):
                return Number(str(number))
            case ast.BinOp(left=left, op=op, right=right):
                return Operation(PYTHON[type(op)], (convert(left), convert(right)))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return Operation("neg", (convert(operand),))
            case ast.Call(func=ast.Name(id=name), args=[argument]):
                return Operation(name, (convert(argument),))
        raise AssertionError(ast.dump(node))

    return convert(ast.parse(text, mode="eval").body)


def spoken_to_symbols(text: str) -> str:
    """Undo the words, knowing nothing of trees: a spoken function holds for the one number after it."""
    for name, phrase in FUNCTION_WORDS.items():
        text = re.sub(rf"{phrase} ([\d.]+)", rf"{name}(\1)", text)
    for operator, phrase in INFIX_WORDS.items():
        text = text.replace(f" {phrase} ", f" {operator} ")
    return text


@settings(deadline=None)
@given(trees)
def test_symbols_parse_back_to_the_tree(tree: Tree) -> None:
    assert parse(symbols(tree)) == tree


@settings(deadline=None)
@given(trees)
def test_words_mean_the_tree(tree: Tree) -> None:
    assert spoken_to_symbols(words(tree)) == symbols(tree)


@settings(deadline=None)
@given(trees)
def test_spoken_functions_are_followed_by_nothing(tree: Tree) -> None:
    for phrase in FUNCTION_WORDS.values():
        assert re.search(rf"{phrase} [\d.]+(?!$|\)|[\d.])", words(tree)) is None


@settings(max_examples=50, deadline=None)
@given(trees)
def test_every_bracket_is_needed(tree: Tree) -> None:
    text = symbols(tree)
    stack, pairs = [], []
    for position, character in enumerate(text):
        if character == "(":
            stack.append(position)
        elif character == ")":
            pairs.append((stack.pop(), position))
    for start, end in pairs:
        is_call = text[:start].endswith(tuple(FUNCTIONS))
        # The unary minus has brackets of its own, by choice, around it and around what it negates.
        if is_call or text[start + 1] == "-" or text[:start].endswith("(-"):
            continue
        without = text[:start] + text[start + 1 : end] + text[end + 1 :]
        try:
            assert parse(without) != tree, f"{text} needs no brackets at {start}"
        except SyntaxError:
            pass


def test_examples() -> None:
    one, two, three = Number("1"), Number("2"), Number("3")
    cases = {
        "1 + 2 * 3": Operation("+", (one, Operation("*", (two, three)))),
        "(1 + 2) * 3": Operation("*", (Operation("+", (one, two)), three)),
        "1 - (2 - 3)": Operation("-", (one, Operation("-", (two, three)))),
        "1 - 2 - 3": Operation("-", (Operation("-", (one, two)), three)),
        "1 ** 2 ** 3": Operation("**", (one, Operation("**", (two, three)))),
        "(1 ** 2) ** 3": Operation("**", (Operation("**", (one, two)), three)),
        "(-1) ** 2": Operation("**", (Operation("neg", (one,)), two)),
        "(-(1 + 2)) * 3": Operation("*", (Operation("neg", (Operation("+", (one, two)),)), three)),
        "sqrt(1 + 2) / 3": Operation("/", (Operation("sqrt", (Operation("+", (one, two)),)), three)),
    }
    for text, tree in cases.items():
        assert symbols(tree) == text
    root = Operation("sqrt", (Number("16"),))
    assert words(Operation("+", (one, root))) == "1 plus the square root of 16"
    assert words(Operation("+", (root, one))) == "sqrt(16) plus 1"
    assert words(Operation("*", (Operation("-", (one, root)), two))) == "(1 minus the square root of 16) times 2"


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_random_trees_have_the_depth_asked_for(seed: int, depth: int) -> None:
    def depth_of(tree: Tree) -> int:
        return 1 + max(map(depth_of, tree.operands)) if isinstance(tree, Operation) else 0

    tree = random_tree(
        random.Random(seed),
        depth=depth,
        max_number=99,
        decimal_fraction=0.5,
        operator_weights=dict.fromkeys(OPERATORS, 1.0),
    )
    assert depth_of(tree) == depth


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5000), st.floats(0, 1))
def test_random_numbers_are_in_range_and_plain(seed: int, max_number: int, decimal_fraction: float) -> None:
    text = random_number(random.Random(seed), max_number, decimal_fraction).text
    assert re.fullmatch(r"(0|[1-9]\d*)(\.\d?[1-9])?", text) and 0 <= float(text) <= max_number
