"""
`--help` without the seconds that importing torch, transformers and TRL takes, whose own settings it lists: a script's
page is kept in the user's cache, named after all that it is made of, and shown from there the next time.

Nothing heavy may be imported here.
"""

import hashlib
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from adamba.disk import write_whole

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


def page_path(script: str | Path) -> Path:
    """Where the page of a script is kept, for this very code, these packages and this width of the terminal."""
    files = [Path(script).resolve(), *sorted(Path(__file__).parent.rglob("*.py"))]
    made_of = [f"{file} {file.stat().st_mtime_ns} {file.stat().st_size}" for file in files]
    made_of += [f"{name} {version(name)}" for name in PACKAGES]
    made_of += [sys.version, str(shutil.get_terminal_size().columns)]
    key = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "adamba" / "help" / f"{Path(script).stem}-{key}.txt"


def show_kept_page(script: str | Path) -> None:
    """
    For the head of a script, before its heavy imports.

    Raises:
        SystemExit: 0, when the command asks for help and the page was shown.
    """
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return
    try:
        page = page_path(script).read_text(encoding="utf-8")
    except OSError:
        return
    print(page, end="")
    raise SystemExit(0)


def keep_page(script: str | Path, page: str) -> None:
    """Keep a page, and no older one of that script. A cache that cannot be written costs seconds, nothing else."""
    try:
        path = page_path(script)
        path.parent.mkdir(parents=True, exist_ok=True)
        for older in path.parent.glob(f"{Path(script).stem}-*.txt"):
            older.unlink(missing_ok=True)
        write_whole(path, page)
    except OSError:
        pass
