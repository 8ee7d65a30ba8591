"""Tools an agent may call: typed, documented functions that always answer with text the model can read."""

from adamba.tools.calculator import CalculatorError, calculator, evaluate, format_number
from adamba.tools.calls import ToolCall, parse_tool_calls, run_tool_call
from adamba.tools.code_interpreter import code_interpreter

TOOLS = {"calculator": calculator, "code_interpreter": code_interpreter}

__all__ = [
    "TOOLS",
    "CalculatorError",
    "ToolCall",
    "calculator",
    "code_interpreter",
    "evaluate",
    "format_number",
    "parse_tool_calls",
    "run_tool_call",
]
