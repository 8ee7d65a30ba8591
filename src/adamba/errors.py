"""The one error class for mistakes a user can mend, and how a script reports them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from adamba.process_group import leave_process_group
from adamba.secrets_kept import redacted


class UserError(ValueError):
    """Bad input. Its message is one line naming the file, the key, the value and what would work."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 2; any other exception keeps its traceback. Where there
    is none, the process leaves its group.

    Works as a decorator of a script's `main` and as a context manager.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {redacted(one_line(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    leave_process_group()  # at a clean end alone: after an error others may still be in it, and closing would wait


def one_line(error: BaseException) -> str:
    """The error's message with every run of white space, line breaks included, as one space."""
    return " ".join(str(error).split())


def printable(text: str) -> str:
    """The text without control characters: what a model or a stranger's data holds must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
