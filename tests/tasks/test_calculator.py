"""The calculator task: every answer is its own expression's value, and only the right one is paid."""

import math
import random
import re

import pytest

from adamba.tasks import TASKS
from adamba.tasks.calculator import PHRASINGS, CalculatorEnvironment, CalculatorSettings, final_answer
from adamba.tools import calculator

TASK = TASKS["calculator"]
ONE = {"max_depth": 1, "max_number": 1}


@pytest.mark.parametrize("tool_free", [False, True])
def test_every_stored_answer_is_the_value_of_its_expression(tool_free: bool) -> None:
    for seed in range(1000):
        row = TASK.example(seed, "train", tool_free=tool_free)
        final = row["messages"][-1]["content"]
        expression, answer = re.fullmatch(r'(.+) # Answer: "(-?\d+\.\d{1,4})"', final).groups()
        # Python's own arithmetic, not the tool's.
        names = {"log": math.log, "sqrt": math.sqrt, "sin": math.sin, "cos": math.cos}
        value = eval(expression, {"__builtins__": {}}, names)  # noqa: S307
        assert answer == str(round(float(value), 4) + 0.0)
        if tool_free:
            assert row["tools"] == [] and [m["role"] for m in row["messages"]] == ["user", "assistant"]
        else:
            call = row["messages"][1]["tool_calls"][0]["function"]
            assert call == {"name": "calculator", "arguments": {"expression": expression}}
            assert row["messages"][2] == {"role": "tool", "name": "calculator", "content": answer}


def test_questions_vary() -> None:
    questions = [TASK.prompt(seed, "train")["prompt"][0]["content"] for seed in range(500)]
    assert len(set(questions)) > 480
    starts = {phrasing.split("{}")[0] for phrasing in PHRASINGS}
    assert all(any(question.startswith(start) for question in questions) for start in starts if start)
    text = " ".join(questions)
    for piece in ("plus", "minus", "times", "divided by", "the square root of", "sqrt(", "(-", " ** ", "(", "."):
        assert piece in text


def test_same_seed_same_row_and_other_seed_other_row() -> None:
    assert TASK.example(7, "train") == TASK.example(7, "train")
    assert TASK.example(7, "train") != TASK.example(8, "train")


def test_train_and_test_never_share_an_expression() -> None:
    small = {"max_depth": 1, "max_number": 9, "decimal_fraction": 0.0}
    train, test = (
        {TASK.prompt(seed, split, **small)["expression"] for seed in range(1500)} for split in ("train", "test")
    )
    assert len(train) > 100 and len(test) > 10 and not train & test


def test_settings_are_obeyed() -> None:
    for seed in range(200):
        row = TASK.prompt(
            seed,
            "train",
            max_depth=2,
            max_number=20,
            decimal_fraction=0.0,
            word_fraction=0.0,
            max_abs_result=50.0,
            operator_weights={"+": 1.0, "*": 1.0},
        )
        assert re.fullmatch(r"[\d +*()]+", row["expression"])
        assert row["expression"] in row["prompt"][0]["content"]
        assert abs(float(row["answer"])) <= 50 and max(map(int, re.findall(r"\d+", row["expression"]))) <= 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 2}, "unknown key 'depth'"),
        ({"operator_weights": {"%": 1.0}}, "'%'"),
        ({"operator_weights": {"+": 0.0}}, "all zero"),
        ({"min_depth": 4}, "min_depth 4"),
        ({"min_depth": 60, "max_depth": 60}, "max_depth is 60; use at most 16"),
        ({"max_depth": 10**9}, "max_depth is 1000000000; use at most 16"),
        ({"max_number": 0}, "max_number is 0"),
        ({"max_abs_result": 0.1, "operator_weights": {"cos": 1.0}, **ONE, "decimal_fraction": 0}, "no train instance"),
        ({"max_abs_result": -1.0}, "max_abs_result is -1; use above 0"),
        ({"max_abs_result": 1e16}, r"max_abs_result is 1e\+16; use above 0, at most 1e\+15, .* has an exponent"),
        ({"operator_weights": {"+": 2, "-": -1}}, "are negative or all zero"),
        ({"operator_weights": {"+": "1"}}, r"operator_weights: '\+': got '1' \(text\), needs number"),
        ({"max_depth": "3"}, r"max_depth: got '3' \(text\), needs whole number"),
        ({"max_number": 9.5}, r"max_number: got 9.5 \(a number\), needs whole number"),
        ({"tool_free": "false"}, r"tool_free: got 'false' \(text\), needs true or false"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        TASK.prompt(0, "train", **settings)
    assert "\n" not in str(error.value) and "calculator" in str(error.value)


@pytest.mark.parametrize("settings", [{}, ONE | {"operator_weights": {"*": 1.0, "**": 1.0}}])
def test_a_rejected_call_has_another_value(settings: dict) -> None:
    """Even where no digit changes it, as in 0 * 0: then it is the answer that is wrong."""
    num_calls = 0
    for seed in range(400):
        pair = TASK.preference(seed, "train", **settings)
        [better], [worse] = pair["chosen"], pair["rejected"]
        if "tool_calls" not in better:
            assert better != worse
            continue
        num_calls += 1
        values = [calculator(**one["tool_calls"][0]["function"]["arguments"]) for one in (better, worse)]
        assert values[0] != values[1], (better, worse)
    assert num_calls > 50


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'dev'"):
        TASK.prompt(0, "dev")


def outcome(row: dict, calls: list[str], final: str) -> dict[str, float]:
    environment = TASK.environments[row["environment"]]()
    assert environment.reset(**row) is None
    for call in calls:
        environment.calculator(call)
    return environment._outcome(final)


def test_the_solver_scores_one() -> None:
    for seed in range(50):
        row = TASK.prompt(seed, "test")
        final = TASK.example(seed, "test")["messages"][-1]["content"]
        got = outcome(row, [row["expression"]], final)
        assert got == {"score": 1, "well_formed": 1, "valid_calls": 1, "invalid_calls": 0, "best_calls": 1}


def test_the_largest_results_are_answered_without_an_exponent() -> None:
    settings = {"max_abs_result": 1e15, "max_number": 10**9, "operator_weights": {"*": 1.0, "**": 1.0}}
    rows = [TASK.prompt(seed, "train", **settings) for seed in range(200)]
    assert any(abs(float(row["answer"])) > 1e13 for row in rows)
    for row in rows:
        assert outcome(row, [row["expression"]], final_answer(row["expression"], row["answer"]))["score"] == 1.0


def test_the_deepest_expressions_are_found_and_answered() -> None:
    row = TASK.prompt(0, "train", min_depth=16, max_depth=16)
    assert outcome(row, [row["expression"]], final_answer(row["expression"], row["answer"]))["score"] == 1.0


def test_only_one_right_answer_is_paid() -> None:
    row = {"environment": "calculator", "expression": "5 + 3", "answer": "8.0"}
    right = '5 + 3 # Answer: "8.0"'
    assert outcome(row, [], right)["score"] == 1
    wrong = [
        "",
        "8.0",
        '# Answer: "7.9999"',
        '# Answer: "8"',
        right + ' # Answer: "9.0"',
        right + right,
        "What is 5 + 3?",
    ]
    assert [outcome(row, [], text)["score"] for text in wrong] == [0] * len(wrong)
    assert outcome(row, [], 'hm # Answer: "8.0"') | {"well_formed": 0} == outcome(row, [], 'hm # Answer: "8.0"')
    assert outcome(row, [], '5 + 3 # Answer: "9.0"')["well_formed"] == 1


def test_calls_are_counted_and_capped() -> None:
    environment = CalculatorEnvironment()
    environment.reset(expression="1 + 1", answer="2.0")
    answers = [environment.calculator(text) for text in ("1 / 0", "1 + 1", "2", "3", "4")]
    assert answers == ["error: division by zero", "2.0", "2.0", "3.0", "error: no calls left, answer now"]
    assert environment._outcome("")["invalid_calls"] == 2
    environment.reset(expression="1 + 1", answer="2.0")
    assert environment._outcome("")["valid_calls"] == 0


def test_the_environment_offers_exactly_the_tool() -> None:
    from transformers.utils import get_json_schema

    [schema] = TASK.example(0, "train")["tools"]
    assert schema == get_json_schema(calculator) == get_json_schema(CalculatorEnvironment().calculator)


def test_preferences_differ_in_one_digit_of_the_same_turn() -> None:
    kinds = set()
    for seed in range(100):
        row = TASK.preference(seed, "train")
        [chosen], [rejected] = row["chosen"], row["rejected"]
        assert chosen != rejected
        kinds.add("tool_calls" in chosen)
        if "tool_calls" in chosen:
            best, worse = (turn["tool_calls"][0]["function"]["arguments"]["expression"] for turn in (chosen, rejected))
        else:
            best, worse = chosen["content"], rejected["content"]
        assert len(best) == len(worse) and sum(a != b for a, b in zip(best, worse, strict=True)) == 1
    assert kinds == {True, False}
    assert TASK.preference(0, "train", tool_free=True)["tools"] == []


def test_default_instances_are_of_moderate_size() -> None:
    rng = random.Random(0)
    lengths = [len(TASK.prompt(rng.getrandbits(40), "train")["expression"]) for _ in range(500)]
    assert max(lengths) < 100 and sum(lengths) / len(lengths) < 35
    assert CalculatorSettings().max_number == 999
