"""`--help` without the seconds that importing what it lists takes.

A run's keys include the fields of transformers' and TRL's configurations, and those bring torch with them. So the
first `--help` of a script keeps its text in the user's cache folder, and later ones print that and import no more:

    if __name__ == "__main__":
        print_kept_help()

A text is printed only as long as nothing has changed that it is made of: this package and the script, the interpreter
and all installed packages by their versions, the width and colours of the terminal. What is missing, stale, damaged or
cannot be read or written is made anew, and nothing is said about it. One thing is not noticed: a library that is
edited in place and keeps its version.
"""

import argparse
import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from adamba.disk import write_whole

PACKAGE = Path(__file__).parent
COLOURS = ("TERM", "NO_COLOR", "FORCE_COLOR", "PYTHON_COLORS")  # argparse's, from Python 3.14 on


class KeepingParser(argparse.ArgumentParser):
    """A parser that keeps its help for `print_kept_help`."""

    def print_help(self, file: Any = None) -> None:
        super().print_help(file)
        keep_help(self.format_help())


def asks_for_help() -> bool:
    """Whether the command line asks for this script's help and nothing else: a recipe beside it would be checked."""
    return sys.argv[1:] in (["--help"], ["-h"])


def print_kept_help() -> None:
    """Print what an earlier `--help` of this script kept, and exit. Returns when there is none or it was not asked."""
    if not asks_for_help():
        return
    try:
        digest, _, text = kept_file().read_text(encoding="utf-8").partition("\n")
        if digest != _digest(text):
            return
    except (OSError, UnicodeError, RuntimeError):
        return
    print(text, end="")
    raise SystemExit(0)


def keep_help(text: str) -> None:
    """Keep a text that was printed, if it is what `print_kept_help` would be asked for."""
    if not asks_for_help():
        return
    try:
        file = kept_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, f"{_digest(text)}\n{text}")
    except (OSError, RuntimeError):
        pass  # the help has been shown; that the next one takes as long is no error


def kept_file() -> Path:
    """One file for each script and width, so the folder does not grow with every change.

    Raises:
        RuntimeError: when the user has no home folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(given) if os.path.isabs(given) else Path.home() / ".cache"  # a relative one is to be ignored
    return home / "adamba" / f"help-{Path(sys.argv[0]).stem}-{shutil.get_terminal_size().columns}.txt"


def _digest(text: str) -> str:
    """Of a help text and all that it is made of, so a stale file and a damaged one fail in the same way.

    Raises:
        OSError: when the script or this package cannot be read.
    """
    colours = [os.environ.get(name) for name in COLOURS]
    parts = [sys.version, Path(sys.argv[0]).name, sys.stdout.isatty(), colours, _installed()]
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
