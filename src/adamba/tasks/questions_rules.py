"""Questions with answers, read from a JSON file `[{"id", "question", "answer"}, …]`, or the few that are built in."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from adamba.errors import UserError
from adamba.tasks.grading import MARKER, answer_of


@dataclass(frozen=True)
class Question:
    """One row of the file; the answer as text."""

    id: str
    question: str
    answer: str


BUILT_IN = (
    ("How many minutes are in two hours?", "120"),
    ("How many days are in three weeks?", "21"),
    ("How many months are in five years?", "60"),
    ("How many sides do four triangles have together?", "12"),
    ("What is a quarter of 100?", "25"),
    ("What is half of 37, as a decimal number?", "18.5"),
    ("What is ten percent of 250?", "25"),
    ("What is the remainder when 29 is divided by 6?", "5"),
    ("What is the smallest prime number greater than 20?", "23"),
    ("What is the largest prime number below 50?", "47"),
    ("What is the sum of the whole numbers from 1 to 10?", "55"),
    ("What is the product of the first four odd numbers?", "105"),
    ("How many letters does the English alphabet have?", "26"),
    ("Which letter comes after m in the English alphabet?", "n"),
    ("Which day comes after Friday?", "Saturday"),
    ("Which month comes before April?", "March"),
    ("How many seconds are in one hour?", "3600"),
    ("How many centimetres are in two and a half metres?", "250"),
    ("How many grams are in three kilograms?", "3000"),
    ("What is two thirds plus one sixth, as a fraction?", "5/6"),
    ("What is 2 to the power of 10?", "1024"),
    ("What is the square root of 144?", "12"),
    ("How many edges does a cube have?", "12"),
    ("How many zeros does one million have?", "6"),
    ("What is the area of a rectangle of 7 by 8?", "56"),
    ("What is the perimeter of a square with side 9?", "36"),
    ("A ticket costs 6 euros. What do seven tickets cost, in euros?", "42"),
    ("A train leaves at 9:30 and travels 45 minutes. At what time does it arrive?", "10:15"),
    ("What is the average of 4, 8 and 15?", "9"),
    ("What is 1000 in Roman numerals?", "M"),
    ("Which number has the Roman numeral XIV?", "14"),
    ("What is the binary number 1011 in decimal?", "11"),
)


@lru_cache
def read_questions(path: str) -> tuple[Question, ...]:
    """The questions of a file; an empty path gives those built in.

    Raises:
        UserError: naming the file and the row that is no question with an answer.
    """
    if not path:
        return tuple(Question(str(number), *pair) for number, pair in enumerate(BUILT_IN, start=1))
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read these questions: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON; expected a list of objects with id, question and answer") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of objects with id, question and answer, and at least one")
    return tuple(_question(row, number, path) for number, row in enumerate(rows, start=1))


def _question(row: object, number: int, path: str) -> Question:
    if not isinstance(row, dict):
        raise UserError(f"{path}: row {number} is no object with id, question and answer")
    for key in ("question", "answer"):
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
            raise UserError(f"{path}: row {number}: key '{key}' is {value!r}, expected a text or a number")
        if str(value).encode(errors="replace").decode() != str(value):
            raise UserError(f"{path}: row {number}: key '{key}' has half of a surrogate pair, which is no text")
    answer = str(row["answer"]).strip()
    if answer_of(f"{MARKER} {answer}") is None:
        raise UserError(f"{path}: row {number}: key 'answer' is {answer[:40]!r}, expected one line without {MARKER!r}")
    return Question(str(row.get("id", number)), str(row["question"]).strip(), answer)
