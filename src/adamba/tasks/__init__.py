"""Procedural tasks: infinite, seeded, solved exactly. A new task is one file and one entry."""

from adamba.tasks.calculator import CALCULATOR
from adamba.tasks.task import Split, Task, tool_methods, tool_schemas
from adamba.tasks.tic_tac_toe import TIC_TAC_TOE

TASKS: dict[str, Task] = {"calculator": CALCULATOR, "tic_tac_toe": TIC_TAC_TOE}

# What a row's `environment` column may name.
ENVIRONMENTS: dict[str, type] = {name: cls for task in TASKS.values() for name, cls in task.environments.items()}

__all__ = ["ENVIRONMENTS", "TASKS", "Split", "Task", "tool_methods", "tool_schemas"]
