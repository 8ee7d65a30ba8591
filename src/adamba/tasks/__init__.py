"""Procedural tasks: infinite, seeded, solved exactly. A new task is one file and one entry."""

from adamba.tasks.calculator import CALCULATOR
from adamba.tasks.code_task import CODE
from adamba.tasks.math_task import MATH
from adamba.tasks.plan_path import PLAN_PATH
from adamba.tasks.questions import QUESTIONS
from adamba.tasks.sokoban import SOKOBAN
from adamba.tasks.sudoku import SUDOKU
from adamba.tasks.task import Split, Task, no_solver, tool_methods, tool_schemas
from adamba.tasks.tic_tac_toe import TIC_TAC_TOE

TASKS: dict[str, Task] = {
    task.name: task for task in (CALCULATOR, TIC_TAC_TOE, SOKOBAN, SUDOKU, PLAN_PATH, MATH, CODE, QUESTIONS)
}

# What a row's `environment` column may name.
ENVIRONMENTS: dict[str, type] = {name: cls for task in TASKS.values() for name, cls in task.environments.items()}

__all__ = ["ENVIRONMENTS", "TASKS", "Split", "Task", "no_solver", "tool_methods", "tool_schemas"]
