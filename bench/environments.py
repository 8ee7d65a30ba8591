"""
How fast the games step on one core, that no policy is paid more than the solver, and how soon the sandbox ends a run.

    python bench/environments.py            # 10,000 random policies a task
    python bench/environments.py --quick    # 200
    python bench/environments.py --measures steps_per_second    # only these; the others' results are kept

Targets: at least 20,000 steps a second for tic_tac_toe, sokoban and plan_path; no reward above the solver's; a run in
the sandbox ends within 2 seconds of its limit.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from runs import RESULTS, write_results

from adamba.rewards import REWARDS
from adamba.tasks import TASKS, code_task, questions, tool_methods
from adamba.tasks.task import tool_call
from adamba.tools.sandbox import Limits, find_backend, run_python

STEPPED = {"tic_tac_toe": ("play", "cell"), "sokoban": ("move", "moves"), "plan_path": ("move", "moves")}
MEASURES = ("steps_per_second", "sandbox", "random_policies")
REPEATS = 7
NUM_INSTANCES = 200  # a task; many policies meet each
WEIGHTS = {"correctness": 1.0, "format": 0.1, "tool_use": 0.1, "efficiency": 0.1}
PROGRAMS = ("def solve(xs): return xs", "def solve(xs): return 0", "def solve(xs): return sum(xs)", "x = (", "")
UNENDING = {
    "endless loop": "while True: pass",
    "endless sleep": "import time\ntime.sleep(1000)",
    "endless output": "while True: print('x' * 1000)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "10 GB allocation": "x = bytearray(10 * 2**30)",
    "reading a file outside": "open('/etc/passwd')",
    "opening a socket": "import socket\nsocket.socket()",
    "killing its parent": "import os\nos.kill(os.getppid(), 9)",
    "leaving a daemon": "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass",
}


def steps_per_second(name: str, num_games: int) -> dict[str, Any]:
    """Random legal and illegal calls on prepared instances; resets are counted in, drawing instances is not."""
    task, (tool, argument) = TASKS[name], STEPPED[name]
    rows = [task.prompt(seed, "train") for seed in range(num_games)]
    rng = random.Random(0)
    values: list = [rng.randint(1, 9) if name == "tic_tac_toe" else rng.choice("UDLR") for _ in range(4096)]
    environment = task.environment()
    rates = []
    for _ in range(REPEATS):
        count, valid, started = 0, 0, time.process_time()
        for row in rows:
            environment.reset(**row)
            step = getattr(environment, tool)
            while not environment._done:
                step(**{argument: values[count % 4096]})
                count += 1
            valid += environment._legal_moves if name == "tic_tac_toe" else environment._valid_calls
        rates.append(count / (time.process_time() - started))
    return {
        "measure": "steps_per_second",
        "task": name,
        "median": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "steps": count,
        "legal_fraction": valid / count,
    }


def random_argument(rng: random.Random, name: str, row: dict, solver_values: list) -> Any:
    """A value for any tool: rubbish, plausible, copied from the prompt, or the solver's own at a wrong moment."""
    kinds = (
        lambda: rng.choice(solver_values),
        lambda: "".join(rng.choice("UDLR") for _ in range(rng.randint(1, 5))),
        lambda: " ".join(str(rng.randint(111, 449)) for _ in range(rng.randint(1, 5))),
        lambda: rng.randint(-1, 11),
        lambda: f"{rng.randint(1, 20)} {rng.choice('+-*/')} {rng.randint(0, 20)}",
        lambda: row["prompt"][0]["content"],
        lambda: rng.choice([None, [], {}, 1.5, True, "", "\0", "x" * 10_000]),
    )
    value = rng.choice(kinds)()
    return rng.choice(PROGRAMS) if name in ("submit", "code_interpreter") and rng.random() < 0.9 else value


@cache
def instance(name: str, seed: int) -> tuple[dict, list[dict]]:
    """A row to play from, and the solver's turns in the example of the same seed."""
    turns = TASKS[name].example(seed, "train")["messages"]
    return TASKS[name].prompt(seed, "train"), [turn for turn in turns if turn["role"] == "assistant"]


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which runs a program only once: the same one answers the same."""
    answers: dict[str, Any] = {}

    def call(*args: Any) -> Any:
        key = repr(args)
        if key not in answers:
            answers[key] = function(*args)
        return answers[key]

    return call


def play_policy(name: str, seed: int, follow_solver: bool) -> float:
    """The weighted reward of one episode: the solver's, or a random policy's."""
    task, rng = TASKS[name], random.Random(seed)
    row, turns = instance(name, seed % NUM_INSTANCES)
    environment = task.environments[row["environment"]]()
    environment.reset(**row)
    if not follow_solver:
        tools = {tool.__name__: tool for tool in tool_methods(environment)}
        arguments = [call["function"]["arguments"] for turn in turns for call in turn.get("tool_calls", [])]
        values = [value for call in arguments for value in call.values()] or [turns[-1]["content"]]
        texts = ["", row["prompt"][0]["content"], "Solved.", "I win.", f"Answer: {rng.randint(0, 50)}"]
        stalls = rng.random() < 0.2  # a fifth of the policies repeats one call
        turns = []
        for _ in range(rng.randint(0, 14)):
            tool = rng.choice([*tools, "nothing"])
            call = tool_call(tool, **{rng.choice(list(PARAMETERS)): random_argument(rng, tool, row, values)})
            if tool in tools and rng.random() < 0.9:
                call = tool_call(tool, **{PARAMETER_OF[tool]: random_argument(rng, tool, row, values)})
            turns.append(turns[0] if stalls and turns else call)
        turns.append({"role": "assistant", "content": rng.choice(texts)})
    completion: list[dict] = []
    for turn in turns:
        completion.append(turn)
        for call in turn.get("tool_calls", []):
            function = call["function"]
            try:
                answer = getattr(environment, function["name"])(**function["arguments"])
            except (AttributeError, TypeError) as error:  # as TRL answers a call that does not fit
                answer = str({"error": str(error)})
            completion.append({"role": "tool", "name": function["name"], "content": answer})
    columns = {"prompts": [row["prompt"]], "completions": [completion], "environments": [environment]}
    return sum(weight * REWARDS[reward](**columns)[0] for reward, weight in WEIGHTS.items())


PARAMETER_OF = {"play": "cell", "move": "moves", "fill": "cells", "calculator": "expression"}
PARAMETER_OF |= {"submit": "code", "code_interpreter": "code"}
PARAMETERS = {"cell", "moves", "cells", "expression", "code", "x"}


def random_policies(name: str, count: int) -> dict[str, Any]:
    """The best reward of `count` random policies beside the solver's. Each program is run once."""
    # The example of tic_tac_toe may begin in a lost position, which its prompt never does.
    solver = (
        1.0
        if name == "tic_tac_toe"
        else min(play_policy(name, seed, True) / sum(WEIGHTS.values()) for seed in range(20))
    )
    started = time.monotonic()
    rewards = [play_policy(name, seed, False) / sum(WEIGHTS.values()) for seed in range(count)]
    return {
        "measure": "random_policies",
        "task": name,
        "policies": count,
        "solver_reward": solver,
        "highest_reward": max(rewards),
        "mean_reward": statistics.mean(rewards),
        "above_solver": sum(reward > solver + 1e-9 for reward in rewards),
        "seconds": time.monotonic() - started,
    }


def sandbox_run(name: str) -> dict[str, Any]:
    """Seconds over the limit of one second until nothing of the run is left."""
    run_python("")  # the backend is found before the clock starts
    limits = Limits(wall_seconds=1.0, cpu_seconds=1)
    result = run_python(UNENDING[name], limits)
    over = result.seconds - limits.wall_seconds
    return {"measure": "sandbox", "run": name, "status": result.status, "seconds": result.seconds, "over_limit": over}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measures", nargs="+", default=MEASURES, choices=MEASURES)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="of random_policies")
    options = parser.parse_args()
    started = time.monotonic()
    num_games, num_policies = (100, 200) if options.quick else (1000, 10_000)
    rows: list[dict[str, Any]] = []
    code_task.run_tests, code_task.interpret = remembered(code_task.run_tests), remembered(code_task.interpret)
    questions.interpret = remembered(questions.interpret)
    if "steps_per_second" in options.measures:
        rows += [steps_per_second(name, num_games) for name in STEPPED]
    if "sandbox" in options.measures:
        rows += [sandbox_run(name) for name in UNENDING]
    if "random_policies" in options.measures:
        rows += [random_policies(name, num_policies) for name in options.tasks]
    previous = RESULTS / "environments.json"
    done = {(row["measure"], row.get("task"), row.get("run")) for row in rows}
    for row in json.loads(previous.read_text(encoding="utf-8"))["rows"] if previous.is_file() else ():
        if (row["measure"], row.get("task"), row.get("run")) not in done:
            rows.append(row)
    targets = {"steps_per_second": 20_000, "above_solver": 0, "over_limit": 2.0}
    write_results("environments", rows, started, targets=targets, sandbox=find_backend().name)


if __name__ == "__main__":
    main()
