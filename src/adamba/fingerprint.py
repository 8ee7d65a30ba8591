"""Fingerprints: has this run been done, with this code, this recipe and these inputs?

A run's fingerprint is taken over the script and every module of this package it imports, over the recipe's values
except those that change no result, and over the content of its inputs. Two runs with the same fingerprint compute
the same checkpoint, so the second need not run.
"""

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from adamba.errors import UserError

# Where a run writes and how it talks, rather than what it computes.
KEYS_WITHOUT_EFFECT = frozenset(
    "disable_tqdm env hub_model_id hub_private hub_revision hub_strategy log_completions log_level "
    "log_level_replica log_on_each_node logging_dir logging_first_step logging_steps logging_strategy max_cost_usd "
    "max_hours num_completions_to_print output_dir push_to_hub report_to resume_from_checkpoint run_name save_steps "
    "save_strategy save_total_limit trackio_space_id project usd_per_gpu_hour".split()
)


def run_fingerprint(code: str, values: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, str]:
    """The fingerprint of a run and of its parts.

    Args:
        code: From `fingerprint_code`, taken when the run starts.
        values: The recipe's keys and values as given (`Recipe.values`).
        inputs: What the run reads: name → path or Hub id, for instance `{"model": "checkpoints/tiny/base"}`.

    Returns:
        `{"fingerprint", "code", "recipe", "inputs"}`, each a hexadecimal sha256. The parts say what changed.
    """
    # a path is not what the run depends on, its content is
    given = set(inputs.values())
    effective = {
        key: _plain(value)
        for key, value in values.items()
        if key not in KEYS_WITHOUT_EFFECT and not (isinstance(value, str) and value in given)
    }
    parts = {
        "code": code,
        "recipe": _sha256(json.dumps(sorted(effective.items()), default=str)),
        "inputs": _sha256(json.dumps([(name, fingerprint_input(path)) for name, path in sorted(inputs.items())])),
    }
    return {"fingerprint": _sha256(json.dumps(parts, sort_keys=True)), **parts}


def fingerprint_code(script: str | Path) -> str:
    """The content hash of the script and of what it imports from this package."""
    return _digest_of(code_files(script), relative_to=Path(script).resolve().parent)


def fingerprint_input(path: str | Path) -> str:
    """The content hash of a file or folder; for anything that is not on this disk (a Hub id) the name's hash.

    A published checkpoint answers from the hashes its `run.json` recorded, without reading the weights again.
    """
    location = Path(path)
    if (location / "run.json").is_file():
        try:
            files = json.loads((location / "run.json").read_text(encoding="utf-8"))["files"]
            hashes = {name: entry["sha256"] for name, entry in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{location / 'run.json'}: not the record of a finished run; run that phase again"
            ) from None
        return _sha256(json.dumps(hashes, sort_keys=True))
    if location.is_dir():
        return _digest_of([p for p in sorted(location.rglob("*")) if p.is_file()], relative_to=location)
    if location.is_file():
        return hash_file(location)
    return _sha256(f"name:{path}")


def hash_file(path: Path) -> str:
    """The sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_files(script: str | Path) -> list[Path]:
    """The script and the files of this package it imports, directly or through others; sorted.

    Only these count: a change of the report does not make a training run stale.
    """
    root = Path(script).resolve().parent
    found: set[Path] = set()
    waiting = [Path(script).resolve()]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        waiting += [file for name in _imported_names(path, root) for file in _files_of(name, root)]
        if path.name == "__init__.py":
            # what a package reads at run time: templates, tables
            found |= {p for p in path.parent.iterdir() if p.is_file() and p.suffix in (".jinja", ".json", ".yaml")}
    return sorted(found)


def _imported_names(path: Path, root: Path) -> set[str]:
    """Dotted names in a file's import statements, relative ones made absolute. `from a import b` gives a and a.b."""
    package = path.relative_to(root).with_suffix("").parts[:-1] if path.is_relative_to(root) else ()
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes(), filename=str(path))) if path.suffix == ".py" else ():
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def _files_of(name: str, root: Path) -> list[Path]:
    """The files under `root` that importing a dotted name runs: every parent package and the module itself."""
    parts = name.split(".")
    if not (root / parts[0]).is_dir() and not (root / f"{parts[0]}.py").is_file():
        return []
    files = []
    for end in range(1, len(parts) + 1):
        folder = root.joinpath(*parts[:end])
        files += [f for f in (folder / "__init__.py", folder.with_suffix(".py")) if f.is_file()]
    return files


def _digest_of(files: list[Path], relative_to: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        name = path.relative_to(relative_to).as_posix() if path.is_relative_to(relative_to) else path.name
        digest.update(f"{name}\0{_hash_unchanged(path, path.stat().st_mtime_ns)}\0".encode())
    return digest.hexdigest()


@cache
def _hash_unchanged(path: Path, _modified_ns: int) -> str:
    return hash_file(path)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A value as the recipe file may have written it: 1 and 1.0, a tuple and a list are the same setting."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
