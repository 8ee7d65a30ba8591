"""`--help` without the seconds that importing what it lists takes.

A run's keys include the fields of transformers' and TRL's configurations, and those bring torch with them. So the
first `--help` of a script keeps its text in the user's cache folder, and later ones print that and import no more:

    if __name__ == "__main__":
        print_kept_help()

`make setup` keeps those of all scripts (`python -m adamba.kept_help src/run_*.py`), so a user's first one is quick.

A text is printed only as long as nothing has changed that it is made of: this package and the script, the interpreter
and all installed packages by their versions, the colours of the terminal. What is missing, stale, damaged or cannot be
read or written is made anew, and nothing is said about it. One thing is not noticed: a library that is edited in place
and keeps its version. Lines have one of two lengths, so that a window may change its size.
"""

import argparse
import contextlib
import hashlib
import io
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from adamba.disk import write_whole

PACKAGE = Path(__file__).parent
COLOURS = ("TERM", "NO_COLOR", "FORCE_COLOR", "PYTHON_COLORS")  # argparse's, from Python 3.14 on
COLUMNS = (80, 110)  # of a help text; a narrower terminal breaks the lines of the first by itself


class KeepingParser(argparse.ArgumentParser):
    """A parser that keeps its help for `print_kept_help`."""

    def print_help(self, file: Any = None) -> None:
        texts = {columns: self._formatted(columns) for columns in COLUMNS}
        self._print_message(texts[columns_shown()], file or sys.stdout)
        if asks_for_help():
            for columns, text in texts.items():
                keep_help(text, columns)

    def _formatted(self, columns: int) -> str:
        before = os.environ.get("COLUMNS")
        os.environ["COLUMNS"] = str(columns)  # argparse asks for no other width, whatever formatter it is given
        try:
            return self.format_help()
        finally:
            del os.environ["COLUMNS"]
            if before is not None:
                os.environ["COLUMNS"] = before


def asks_for_help() -> bool:
    """Whether the command line asks for this script's help and nothing else: a recipe beside it would be checked."""
    return sys.argv[1:] in (["--help"], ["-h"])


def columns_shown() -> int:
    """The longest lines that fit this terminal."""
    return max([COLUMNS[0], *(columns for columns in COLUMNS if columns <= shutil.get_terminal_size().columns)])


def print_kept_help() -> None:
    """Print what an earlier `--help` of this script kept, and exit. Returns when there is none or it was not asked.

    Being what every script does first, it also sees to it that Ctrl-C during the imports that follow ends in silence.
    """
    sys.excepthook = _without_interrupts
    if not asks_for_help():
        return
    try:
        digest, _, text = kept_file(columns_shown()).read_text(encoding="utf-8").partition("\n")
        if digest != _digest(text):
            return
    except (OSError, UnicodeError, RuntimeError):
        return
    print(text, end="")
    raise SystemExit(0)


def _without_interrupts(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Python then ends by the signal, which a shell calls 130."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


def keep_help(text: str, columns: int) -> None:
    """Keep a text for `print_kept_help`."""
    try:
        file = kept_file(columns)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, f"{_digest(text)}\n{text}")
    except (OSError, RuntimeError):
        pass  # the help has been shown; that the next one takes as long is no error


def kept_file(columns: int) -> Path:
    """One file for each script and length of lines, so the folder does not grow with every change.

    Raises:
        RuntimeError: when the user has no home folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(given) if os.path.isabs(given) else Path.home() / ".cache"  # a relative one is to be ignored
    return home / "adamba" / f"help-{Path(sys.argv[0]).stem}-{columns}.txt"


def _digest(text: str) -> str:
    """Of a help text and all that it is made of, so a stale file and a damaged one fail in the same way.

    Raises:
        OSError: when the script or this package cannot be read.
    """
    colours = [sys.stdout.isatty(), *map(os.environ.get, COLOURS)] if sys.version_info >= (3, 14) else []
    parts = [sys.version, Path(sys.argv[0]).name, colours, _installed()]
    digest = hashlib.sha256(f"{parts!r}\0{text}".encode())
    for file in [Path(sys.argv[0]), *sorted(PACKAGE.rglob("*.py"))]:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _installed() -> list[str]:
    """Every folder that modules come from, and what is installed there, as in `torch-2.13.0.dist-info`.

    All of it, since defaults also depend on which other packages there are. The names tell the versions;
    `importlib.metadata` would open a file for each.
    """
    folders = [Path(entry) for entry in sys.path]
    return [str(path) for folder in folders for path in [folder, *sorted(folder.glob("*-info"))]]


def keep_all(scripts: list[str]) -> None:
    """Keep the help of each script, as if it had been asked for: one process, so what they share is imported once."""
    for script in scripts:
        sys.argv, sys.path[0] = [script, "--help"], str(Path(script).resolve().parent)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    keep_all(sys.argv[1:])
