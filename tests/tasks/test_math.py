"""Math and questions: every stored answer is right, only a right one is paid, files are read or refused by line."""

import json
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from adamba.data.arguments import DataArguments
from adamba.errors import UserError
from adamba.tasks import TASKS, grading
from adamba.tasks.grading import answer_of, is_same_answer
from adamba.tasks.math_rules import random_problem
from adamba.tools.code_interpreter import code_interpreter

MATH, QUESTIONS = TASKS["math"], TASKS["questions"]
FREE = {"tool_free": True}


def outcome(task_id: str, row: dict, final: str) -> dict[str, float]:
    environment = TASKS[task_id].environments[row["environment"]]()
    environment.reset(**row)
    return environment._outcome(final)


def test_math_answers_are_the_values_of_their_expressions() -> None:
    for seed in range(500):
        row = MATH.prompt(seed, "train")
        # Python's own whole-number arithmetic; `/` leaves no rest.
        value = eval(re.sub(r"\d+", r"Fraction(\g<0>)", row["expression"]), {"Fraction": Fraction})  # noqa: S307
        assert str(value) == row["answer"]
        messages = MATH.example(seed, "train")["messages"]
        assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"expression": row["expression"]}
        assert float(messages[2]["content"]) == value and messages[3]["content"] == f"Answer: {value}"


def test_stories_tell_what_the_expression_says() -> None:
    """The story retold by a reader of its sentences gives the same number."""
    rng = random.Random(0)
    read = 0
    while read < 300:
        problem = random_problem(rng, rng.randint(1, 4), 20)
        if problem is None:
            continue
        read += 1
        first, *events, _ = re.split(r"(?<=[.?]) ", problem.question)
        have = int(re.search(r"\d+", first)[0])
        for event in events:
            numbers = [int(number) for number in re.findall(r"\d+", event)]
            if " of " in event and "each" in event:
                have += numbers[0] * numbers[1]
            elif "more" in event:
                have += numbers[0]
            elif "given away" in event:
                have -= numbers[0]
            elif "share" in event:
                assert have % numbers[0] == 0
                have //= numbers[0]
            else:
                have *= 2 if "doubles" in event else 3
            assert have >= 0
        assert have == problem.value


def test_only_one_right_answer_is_paid() -> None:
    row = MATH.prompt(1, "train") | {"answer": "24"}
    assert outcome("math", row, "Answer: 24") == outcome("math", row, "  Answer: 24 ")
    assert outcome("math", row, "So it is 24. Answer: 24")["score"] == 1.0
    assert outcome("math", row, "So it is 24. Answer: 24")["well_formed"] == 0.0
    assert outcome("math", row, "Answer: 24 apples") == outcome("math", row, "So it is 24. Answer: 24")
    wrong = ["", "24", "Answer: 25", "Answer: 24.5", "Answer: 240", "Answer: -24", "Answer: 24 Answer: 25"]
    wrong += ["Answer: 24,000", "Answer: 24/7", "Answer: 24 * 2", "Answer: 24e5", "Answer: 24 or 25", "Answer: 24%"]
    for text in wrong:
        assert outcome("math", row, text)["score"] == 0.0, text
    assert outcome("math", row, row["prompt"][0]["content"])["score"] == 0.0


def test_math_splits_and_settings() -> None:
    small = {"max_steps": 1, "max_number": 6, "expression_fraction": 1.0}
    train, test = (
        {MATH.prompt(seed, split, **small)["expression"] for seed in range(500)} for split in ("train", "test")
    )
    assert train and test and not train & test
    for settings, message in (
        ({"min_steps": 4}, "min_steps 4"),
        ({"max_number": 1}, "max_number is 1"),
        ({"expression_fraction": 2}, "expression_fraction is 2"),
        ({"steps": 2}, "unknown key 'steps'"),
    ):
        with pytest.raises(UserError, match=message):
            MATH.prompt(0, "train", **settings)
    for seed in range(50):
        pair = MATH.preference(seed, "train")
        assert pair["chosen"] != pair["rejected"]


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("120", "120", True),
        ("120.0", "120", True),
        ("1,200", "1200", True),
        ("$5$", "5", True),
        ("10/12", "5/6", True),
        (" saturday. ", "Saturday", True),
        ("to be " * 30 + "or not", "to be " * 30 + "or not", True),
        ("to be " * 30 + "and not", "to be " * 30 + "or not", False),
        ("Sunday", "Saturday", False),
        ("5/0", "5", False),
        ("121", "120", False),
        ("", "120", False),
        ("9^9^9^9", "1", False),
        ("9" * 5000, "1", False),
        ("(10!)!", "1", False),
        ("2^{9999999}", "1", False),
    ],
)
def test_grading_by_text_and_number(answer: str, gold: str, same: bool) -> None:
    assert is_same_answer(answer, gold) is same


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        (".5", "0.5", True),
        ("-.5", "-0.5", True),
        (".5", "5", False),
        ("$ 5. $", "5", True),
        ("3,4", "34", False),
        ("1,2,3", "123", False),
        ("1,234,567.5", "1234567.5", True),
        ("-1,000/2", "-500", True),
        ("12,34", "1234", False),
        ("1234,567", "1234567", False),
        ("0.123,456", "0.123456", False),
    ],
)
def test_points_and_commas_in_numbers(answer: str, gold: str, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "has_math_verify", lambda: False)
    assert is_same_answer(answer, gold) is same


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [("\\frac{1}{2}", "0.5", True), ("\\sqrt{2}/2", "\\frac{1}{\\sqrt{2}}", True), ("\\frac{1}{3}", "0.5", False)],
)
def test_grading_by_math_verify(answer: str, gold: str, same: bool) -> None:
    pytest.importorskip("math_verify")
    assert is_same_answer(answer, gold) is same


def test_without_math_verify_another_form_counts_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "has_math_verify", lambda: False)
    assert not is_same_answer("\\frac{1}{2}", "0.5") and is_same_answer("1/2", "0.5")


def test_the_answer_is_what_stands_after_its_only_marker() -> None:
    assert answer_of("so\nAnswer: 5 apples") == "5 apples"
    for text in ("", "5", "Answer:", "Answer: 5 Answer: 6", "Answer: 5\nor 6"):
        assert answer_of(text) is None


def test_questions_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "qa.json"
    file.write_text(json.dumps([{"id": n, "question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(99)]))
    drawn = {
        split: [QUESTIONS.prompt(seed, split, data_file=str(file)) for seed in range(200)]
        for split in ("train", "test")
    }
    ids = {split: {row["question_id"] for row in rows} for split, rows in drawn.items()}
    assert len(ids["train"]) > 60 and len(ids["test"]) > 3 and not ids["train"] & ids["test"]
    for row in drawn["train"][:20]:
        free = row | {"environment": "questions_tool_free"}
        assert row["answer"] == str(2 * int(row["question_id"]))
        assert outcome("questions", free, f"Answer: {row['answer']}")["score"] == 1.0
        for text in ("", row["prompt"][0]["content"], f"Answer: {row['answer']}1", row["answer"]):
            assert outcome("questions", free, text)["score"] == 0.0
    settings = {"data_file": str(file)} | FREE
    example = QUESTIONS.example(0, "train", **settings)
    assert example["tools"] == [] and example["messages"][-1]["content"].startswith("Answer: ")
    for seed in range(20):
        pair = QUESTIONS.preference(seed, "train", **settings)
        assert pair["chosen"][0]["content"] != pair["rejected"][0]["content"]


def test_seeds_in_a_row_ask_each_question_once_before_any_again(tmp_path: Path) -> None:
    file = tmp_path / "qa.json"
    file.write_text(json.dumps([{"id": n, "question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(99)]))
    asked = [QUESTIONS.prompt(seed, "test", data_file=str(file))["question_id"] for seed in range(99)]
    count = len(set(asked))
    assert count > 3 and asked[:count] == asked[count : 2 * count] and len(set(asked[:count])) == count
    assert asked[:count] != sorted(asked[:count], key=int)
    file = tmp_path / "few.json"
    file.write_text('[{"question": "What is 0 + 0?", "answer": 0}]')
    with pytest.raises(UserError, match="few.json: none of 1 questions is of split 'test'; give more"):
        QUESTIONS.prompt(0, "test", data_file=str(file))


def test_data_files_of_a_recipe_name_the_questions() -> None:
    arguments = DataArguments(
        mix={"questions": 1.0}, data_files={"questions": "qa.json", "flan_cot": "x"}, task_settings={"questions": FREE}
    )
    assert arguments.task_settings == {"questions": {"tool_free": True, "data_file": "qa.json"}}
    assert arguments.data_files == {"flan_cot": "x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "at least one"),
        ("{}", "expected a list"),
        ('[{"question": "a", "answer": "b"}, 5]', "row 2 is no object"),
        ('[{"question": "a"}]', "row 1: key 'answer' is None"),
        ('[{"question": " ", "answer": "b"}]', "row 1: key 'question' is ' '"),
        ('[{"question": "a", "answer": ["b"]}]', "row 1: key 'answer'"),
        ('[{"question": "a\\ud83d", "answer": "b"}]', "row 1: key 'question' has half of a surrogate pair"),
        ('[{"question": "a", "answer": "b\\nc"}]', "row 1: key 'answer' is 'b.*expected one line"),
        ('[{"question": "a", "answer": "Answer: b"}]', "row 1: key 'answer' is 'Answer: b', expected one line"),
    ],
)
def test_bad_question_files_are_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "qa.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"qa.json: .*{message}") as error:
        QUESTIONS.prompt(0, "train", data_file=str(file))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="nowhere.json: cannot read"):
        QUESTIONS.prompt(0, "train", data_file="nowhere.json")


def test_built_in_questions_accept_their_answers_and_no_other() -> None:
    questions = [QUESTIONS.prompt(seed, "train", **FREE) for seed in range(60)]
    for row, other in zip(questions, questions[1:], strict=False):
        assert outcome("questions", row, f"Answer: {row['answer']}")["score"] == 1.0
        if other["answer"] != row["answer"]:
            assert outcome("questions", row, f"Answer: {other['answer']}")["score"] == 0.0


def test_the_tool_of_questions_is_the_code_interpreter() -> None:
    from transformers.utils import get_json_schema

    assert QUESTIONS.example(0, "train")["tools"] == [get_json_schema(code_interpreter)]
    with pytest.raises(UserError, match="isolation: got 'maybe'"):
        QUESTIONS.prompt(0, "train", isolation="maybe")


@pytest.mark.parametrize(
    ("code", "runs"),
    [("print(1)", True), ("print('error: none')", True), ("print(1, end='')\n1 / 0", False), (5, False)],
)
def test_a_call_counts_as_valid_when_its_code_ran_to_its_end(code: object, runs: bool) -> None:
    environment = QUESTIONS.environment()
    environment.reset(answer="1", isolation="none")
    environment.code_interpreter(code)
    found = environment._outcome()
    assert (found["valid_calls"], found["invalid_calls"]) == (float(runs), float(not runs))
