"""The code task: the reference solutions pass, what merely looks like passing does not, and nothing gets out."""

import random

import pytest
from transformers.utils import get_json_schema

from adamba.errors import UserError
from adamba.tasks import TASKS
from adamba.tasks.code_rules import random_inputs, random_specification
from adamba.tasks.code_task import HARNESS, CodeEnvironment, run_tests
from adamba.tools import code_interpreter
from isolation import isolated

TASK = TASKS["code"]


def environment_of(seed: int) -> CodeEnvironment:
    environment = CodeEnvironment()
    environment.reset(**TASK.prompt(seed, "train"))
    return environment


def solution_of(seed: int) -> str:
    return TASK.example(seed, "train")["messages"][1]["tool_calls"][0]["function"]["arguments"]["code"]


def test_reference_solutions_compute_what_is_expected() -> None:
    """In this process, for speed: they are this package's own text."""
    for seed in range(300):
        specification = random_specification(random.Random(seed))
        names: dict = {}
        exec(specification.solution, names)  # noqa: S102
        for xs in random_inputs(random.Random(seed), 6):
            assert names["solve"](list(xs)) == specification.function(xs), specification.words


@isolated
def test_the_solver_passes_at_once() -> None:
    for seed in range(3):
        environment = environment_of(seed)
        messages = TASK.example(seed, "train")["messages"]
        assert environment.submit(solution_of(seed)) == messages[2]["content"] == "8 of 8 tests pass. Solved."
        outcome = environment._outcome(messages[3]["content"])
        assert outcome["score"] == outcome["well_formed"] == outcome["valid_calls"] == outcome["best_calls"] == 1.0
        assert environment.submit("x") == "It is over. Solved." and environment._outcome()["invalid_calls"] == 1.0


CHEATS = {
    "nothing": "pass",
    "no function": "print('8 of 8 tests pass. Solved.')",
    "equal to everything": (
        "class All(list):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef solve(xs): return All()"
    ),
    "another json": "import json\njson.dumps = lambda *a, **k: '[0]'\ndef solve(xs): return 0",
    "exit before the tests": "import sys, os\nprint('[]', flush=True)\nos._exit(0)",
    "a huge result": "def solve(xs): return 10 ** 5000",
    "a deep result": "def solve(xs):\n    x = []\n    for i in range(900): x = [x]\n    return x",
    "broken text": "def solve(xs): return '\\ud800'",
    "floats for numbers": "def solve(xs): return 0.0",
    "endless recursion": "def solve(xs): return solve(xs)",
}


@isolated
@pytest.mark.parametrize("name", CHEATS)
def test_what_only_looks_like_passing_does_not_pass(name: str) -> None:
    inputs, expected = [[1], [2, 3], [4]], [[1], [2, 3], [16]]
    passed, _ = run_tests(CHEATS[name], inputs, expected, "required")
    assert passed == 0


@isolated
def test_the_expected_results_never_reach_the_code() -> None:
    seen = "import sys\ndef solve(xs): return sorted(map(str, sys.argv))\nprint(open('/proc/self/cmdline').read())"
    assert run_tests(seen, [[1]], [[424242]], "required")[0] == 0
    assert "expected" not in HARNESS


@isolated
def test_failed_submissions_cost_and_are_limited() -> None:
    environment = environment_of(0)
    assert "tests pass. error: line 1: NameError" in environment.submit("foo")
    assert environment.submit(solution_of(0)).endswith("Solved.")
    assert environment._outcome("Solved.")["score"] == pytest.approx(0.9)
    environment = environment_of(0)
    answers = [environment.submit("def solve(xs): return None") for _ in range(3)]
    assert answers[2].endswith("Not solved.") and environment._outcome("Solved.")["score"] == 0.0
    assert environment.submit(solution_of(0)) == "It is over. Not solved."


@isolated
def test_code_may_be_run_before_but_not_without_end() -> None:
    environment = environment_of(1)
    assert environment.code_interpreter("print(1 + 1)") == "2"
    assert [environment.code_interpreter(None) for _ in range(4)][-1] == "error: no runs left, submit now"
    assert environment._outcome()["score"] == 0.0 and environment._outcome()["invalid_calls"] == 1.0


@pytest.mark.parametrize("code", ["", None, 5, " ", "x" * 8001])
def test_what_is_no_code_is_refused_without_running(code: object) -> None:
    environment = CodeEnvironment()
    environment._begin("", [[1]], [1], "required")
    assert environment.submit(code).startswith("error: the code must be text")  # type: ignore[arg-type]
    assert environment._outcome()["valid_calls"] == 0.0 and environment._outcome()["invalid_calls"] == 1.0


def test_splits_settings_schemas_and_preferences() -> None:
    train, test = (
        {TASK.prompt(seed, split)["prompt"][0]["content"].split("\n")[0] for seed in range(300)}
        for split in ("train", "test")
    )
    assert len(train) > 150 and test and not train & test
    assert TASK.example(3, "train") == TASK.example(3, "train") != TASK.example(4, "train")
    for settings, message in (({"num_tests": 2}, "num_tests is 2"), ({"isolation": "no"}, "isolation: got 'no'")):
        with pytest.raises(UserError, match=message):
            TASK.prompt(0, "train", **settings)
    assert TASK.example(0, "train")["tools"] == [
        get_json_schema(code_interpreter),
        get_json_schema(CodeEnvironment().submit),
    ]
    for seed in range(30):
        pair = TASK.preference(seed, "train")
        assert pair["chosen"] != pair["rejected"]
        assert pair["chosen"][0]["tool_calls"][0]["function"]["arguments"]["code"] == solution_of(seed)


def test_a_machine_without_isolation_refuses_at_the_first_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UserError("code_interpreter: this machine cannot isolate code")

    monkeypatch.setattr("adamba.tools.sandbox.find_backend", refuse)
    for task_id in ("code", "questions"):
        environment = TASKS[task_id].environment()
        with pytest.raises(UserError, match="cannot isolate"):
            environment.reset(**TASKS[task_id].prompt(0, "train"))
        environment.reset(**TASKS[task_id].prompt(0, "train", isolation="none"))
