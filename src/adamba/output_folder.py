"""Which folders a run may replace: only what a run of this project wrote, and nothing that it reads.

A finished run's folder has a `run.json` that lists its files; one that is being written has the mark `.unfinished`.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from adamba.disk import check_output_dir
from adamba.errors import UserError

logger = logging.getLogger("adamba")

MARK = ".unfinished"

# They describe the run and are not what the next phase reads, so run.json does not record their hashes.
DESCRIBING_FILES = frozenset({"run.json", "metrics.json", "README.md", "recipe.yaml", "log_history.json", MARK})
PICTURES = frozenset({"images", "images/training.png", "images/widths.png"})  # drawn when the folder is pushed
ADDED_LATER = PICTURES | {"games.json", ".DS_Store"}  # by run_games.py; by a Mac that shows the folder


def check_output_folder(output_dir: str | Path, values: Mapping[str, Any]) -> None:
    """
    Refuse an output folder whose content a run must not replace, or that cannot be written.

    Args:
        output_dir: Where the run will publish.
        values: The recipe's, which name what the run reads.

    Raises:
        UserError: naming the folder and what it holds.
    """
    folder = Path(output_dir)
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"output_dir: {output_dir} is the current folder or one above it; name a folder of its own")
    check_output_dir(folder)
    refuse_inputs(folder, values)
    for ending in (".tmp", ".previous"):
        if (beside := folder.with_name(folder.name + ending)).exists() and (found := foreign_file(beside)):
            raise UserError(f"output_dir: {output_dir} needs {beside}, but that holds {found}; move it away")
    for ending in (".trainer", ".surgery"):
        if (beside := folder.with_name(folder.name + ending)).is_file():
            raise UserError(f"output_dir: {output_dir} needs the folder {beside}, which is a file; move it away")
    if folder.exists() and (found := foreign_file(folder)):
        raise UserError(
            f"output_dir: {output_dir} would be replaced, but it holds {found}, which no run of this project wrote; "
            f"name another folder, or move that away"
        )


def refuse_inputs(output_dir: str | Path, values: Mapping[str, Any]) -> None:
    """
    Refuse an output folder that is, holds or lies in something that the run reads.

    Raises:
        UserError: naming both, and the key.
    """
    folder = Path(output_dir).resolve()
    for key, name in _inputs(values):
        path = Path(name)
        if not path.exists():  # on the Hub
            continue
        if path.resolve().is_relative_to(folder) or folder.is_relative_to(path.resolve()):
            raise UserError(f"output_dir: {output_dir} overlaps {key}: {name}, which this run reads; name another")


def _inputs(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("model_name_or_path", "tokenizer_name_or_path"):
        if values.get(key):
            yield key, values[key]
    for source, path in (values.get("data_files") or {}).items():
        yield f"data_files: {source}", path
    for task, settings in (values.get("task_settings") or {}).items():
        if isinstance(settings, dict) and isinstance(settings.get("data_file"), str):
            yield f"task_settings: {task}: data_file", settings["data_file"]


def foreign_file(folder: Path) -> str | None:
    """The first thing in a folder that no run of this project wrote there; None when there is none."""
    if (folder / MARK).is_file():
        return None
    recorded = _recorded(folder)
    if not recorded:
        return min((path.name for path in folder.iterdir()), default=None)
    # in each of its folders: an adapter has a README.md of its own
    inside = {parent for name in recorded for parent in PurePosixPath(name).parents}
    ours = {PurePosixPath(name) for name in recorded} | inside
    ours |= {parent / name for parent in inside for name in DESCRIBING_FILES | ADDED_LATER}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if PurePosixPath(name.removesuffix(".tmp")) not in ours:
            return name
    return None


def _recorded(folder: Path) -> list[str]:
    """What `run.json` lists, itself included; nothing if that is no record of a run."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return [*run["files"], "run.json"] if run["fingerprint"] else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def discard(folder: Path) -> None:
    """Remove a folder that runs wrote. One that holds anything else is kept under a free name."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists() and (found := foreign_file(folder)):
        names = (folder.with_name(f"{folder.name}.kept{number}") for number in range(1, 10**6))
        kept = next(name for name in names if not name.exists())
        folder.rename(kept)
        logger.warning("kept what was in %s as %s: it holds %s, which no run wrote", folder, kept, found)
    elif folder.exists():
        # What tells that it is ours goes last, should this be interrupted.
        (folder / MARK).touch()
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MARK:
                path.unlink()
        shutil.rmtree(folder, ignore_errors=True)
