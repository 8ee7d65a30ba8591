"""The code interpreter as a tool: Python code in, what it printed or what went wrong out."""

from adamba.tools.sandbox import DEFAULT_LIMITS, Isolation, Limits, run_python

MAX_CHARACTERS = 8000


def code_interpreter(code: str) -> str:
    """Run Python code and get what it prints.

    Args:
        code: Like print(2 + 3).
    """
    return interpret(code)[0]


def interpret(code: object, limits: Limits = DEFAULT_LIMITS, isolation: Isolation = "required") -> tuple[str, bool]:
    """`code_interpreter` with other limits: its answer, and whether the code ran to its end.

    Raises:
        UserError: isolation is required and this machine has none.
    """
    if not isinstance(code, str):
        return "error: the code must be text", False
    if len(code) > MAX_CHARACTERS:
        return f"error: the code is longer than {MAX_CHARACTERS} characters", False
    result = run_python(code, limits, isolation)
    if not result.error:
        return result.output.rstrip("\n") or "(it printed nothing)", True
    printed = result.output if result.status == "failed" else ""
    newline = "" if printed.endswith("\n") or not printed else "\n"
    return f"{printed}{newline}error: {result.error}", False
