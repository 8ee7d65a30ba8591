"""The code interpreter as a tool: Python code in, what it printed or what went wrong out."""

from adamba.tools.sandbox import DEFAULT_LIMITS, Isolation, Limits, run_python

MAX_CHARACTERS = 8000


def code_interpreter(code: str) -> str:
    """Run Python code and get what it prints.

    Args:
        code: Like print(2 + 3).
    """
    return interpret(code)


def interpret(code: object, limits: Limits = DEFAULT_LIMITS, isolation: Isolation = "required") -> str:
    """`code_interpreter` with other limits.

    Raises:
        UserError: isolation is required and this machine has none.
    """
    if not isinstance(code, str):
        return "error: the code must be text"
    if len(code) > MAX_CHARACTERS:
        return f"error: the code is longer than {MAX_CHARACTERS} characters"
    result = run_python(code, limits, isolation)
    if not result.error:
        return result.output.rstrip("\n") or "(it printed nothing)"
    return f"{result.output}error: {result.error}" if result.status == "failed" else f"error: {result.error}"
