"""Questions: answer one from a file, with a code interpreter at hand (or, with `tool_free: true`, at once).

How many minutes are in two hours?   →  code_interpreter("print(2 * 60)") → 120  →  Answer: 120

mix: {questions: 1.0}
data_files: {questions: my_questions.json}      # [{"id": "1", "question": "…", "answer": "…"}, …]
"""

import random
from dataclasses import dataclass
from functools import lru_cache

from adamba.errors import UserError
from adamba.tasks.grading import MARKER, answer_of, is_same_answer
from adamba.tasks.questions_rules import Question, read_questions
from adamba.tasks.task import Row, Split, Task, settings_from, split_of, tool_schemas
from adamba.tools.code_interpreter import interpret
from adamba.tools.sandbox import DEFAULT_LIMITS, Isolation, require

NAME = "questions"
TOOL_FREE_NAME = "questions_tool_free"
MAX_CALLS = 4


@dataclass(frozen=True)
class QuestionsSettings:
    """Settings of the questions task.

    Attributes:
        data_file: JSON file of `[{"id", "question", "answer"}]`; empty takes a few built-in ones. `data_files:
            {questions: …}` of a recipe is the same.
        tool_free: No tool: the assistant answers at once.
        isolation: `required`: refuse to run where the machine cannot isolate code; `none`: run it unprotected.
    """

    data_file: str = ""
    tool_free: bool = False
    isolation: Isolation = "required"


class ToolFreeQuestionsEnvironment:
    """An episode without tools: the outcome depends on the final text alone."""

    def __init__(self) -> None:
        self._begin("", "required")

    def reset(self, answer: str, isolation: Isolation, **row: object) -> None:
        """Start the episode of a `prompt` row; the prompt is complete, so nothing is added to it."""
        self._begin(answer, isolation)

    def _begin(self, answer: str, isolation: Isolation) -> None:
        self._answer = answer
        self._isolation = isolation
        self._valid_calls = 0
        self._invalid_calls = 0

    @property
    def _done(self) -> bool:
        return False  # a text without a call ends the episode, nothing else

    def _outcome(self, final_text: str = "") -> dict[str, float]:
        """Score the episode from the assistant's last text."""
        answer = answer_of(final_text)
        return {
            "score": float(bool(self._answer) and answer is not None and is_same_answer(answer, self._answer)),
            "well_formed": float(answer is not None and final_text.strip() == final_answer(answer)),
            "valid_calls": float(self._valid_calls),
            "invalid_calls": float(self._invalid_calls),
            # Whether a question needs the interpreter is not known: one call is neither asked for nor held against it.
            "best_calls": float(min(1, self._valid_calls)),
        }


class QuestionsEnvironment(ToolFreeQuestionsEnvironment):
    """An episode with the code interpreter."""

    def reset(self, answer: str, isolation: Isolation, **row: object) -> None:
        """Start the episode of a `prompt` row; the prompt is complete, so nothing is added to it.

        Raises:
            UserError: isolation is required and this machine has none.
        """
        require(isolation)
        self._begin(answer, isolation)

    def code_interpreter(self, code: str) -> str:
        """Run Python code and get what it prints.

        Args:
            code: Like print(2 + 3).
        """
        if self._valid_calls + self._invalid_calls >= MAX_CALLS:
            self._invalid_calls += 1
            return "error: no calls left, answer now"
        result, ran = interpret(code, DEFAULT_LIMITS, self._isolation)
        self._valid_calls += ran
        self._invalid_calls += not ran
        return result


def final_answer(answer: str) -> str:
    """The assistant's last turn."""
    return f"{MARKER} {answer}"


def prompt(seed: int, split: Split, **settings: object) -> Row:
    """One question with its answer, for RL and evaluation."""
    config = settings_from(QuestionsSettings, NAME, settings)
    questions = _of_split(config.data_file, split)
    drawn = questions[seed % len(questions)]
    return {
        "prompt": [{"role": "user", "content": f"{drawn.question}\nEnd with {MARKER} and the answer alone."}],
        "environment": TOOL_FREE_NAME if config.tool_free else NAME,
        "seed": seed,
        "split": split,
        "question_id": drawn.id,
        "answer": drawn.answer,
        "isolation": config.isolation,
    }


def example(seed: int, split: Split, **settings: object) -> Row:
    """One question with its answer at once: the file says nothing of how it is found."""
    row = prompt(seed, split, **settings)
    last = {"role": "assistant", "content": final_answer(row["answer"])}
    return {"messages": [*row["prompt"], last], "tools": _tools(row)}


def preference(seed: int, split: Split, **settings: object) -> Row:
    """The answer against that of another question.

    Raises:
        UserError: all questions have the same answer.
    """
    row = prompt(seed, split, **settings)
    config = settings_from(QuestionsSettings, NAME, settings)
    others: list[Question] = [
        other for other in read_questions(config.data_file) if not is_same_answer(other.answer, row["answer"])
    ]
    if not others:
        raise UserError(
            f"settings of task {NAME}: all questions have the answer {row['answer']!r}; no wrong one to set"
        )
    wrong = random.Random(f"{NAME}/preference/{split}/{seed}").choice(others).answer
    return {
        "prompt": row["prompt"],
        "chosen": [{"role": "assistant", "content": final_answer(row["answer"])}],
        "rejected": [{"role": "assistant", "content": final_answer(wrong)}],
        "tools": _tools(row),
    }


@lru_cache
def _of_split(data_file: str, split: Split) -> tuple[Question, ...]:
    """The questions of a split in an order of their own: seeds in a row ask each once before any again.

    Raises:
        UserError: there is none.
    """
    questions = read_questions(data_file)
    ours = [question for question in questions if split_of(question.question) == split]
    if not ours:
        raise UserError(
            f"{data_file or NAME}: none of {len(questions)} questions is of split {split!r}; give more (one in eight, "
            "by its text, is 'test')"
        )
    return tuple(random.Random(f"{NAME}/{split}").sample(ours, len(ours)))


def _tools(row: Row) -> list[dict]:
    return [] if row["environment"] == TOOL_FREE_NAME else tool_schemas(QuestionsEnvironment)


QUESTIONS = Task(
    name=NAME,
    environments={NAME: QuestionsEnvironment, TOOL_FREE_NAME: ToolFreeQuestionsEnvironment},
    example=example,
    prompt=prompt,
    preference=preference,
)
