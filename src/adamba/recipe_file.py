"""Recipe files as they lie on disk, read without any of the training stack (that takes seconds to import)."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import yaml

from adamba.errors import UserError, one_line
from adamba.recipe_values import load_yaml


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run was asked to do.

    Attributes:
        path: The recipe file, or None when everything came from the command line.
        script: The script's file, for instance `src/run_sft.py`.
        code: Its fingerprint and that of what it imports, taken now: a file edited while the run goes on was not run.
        values: The keys given by the recipe or the command line, with the values that hold.
        resolved: `values` and the defaults of this project's own dataclasses. Publishing writes it as `recipe.yaml`,
            which is itself a recipe of the same script.
        asked: The recipe file, or else the script, and what the command line gave but the model and secrets: of one
            model the same words ask for the same.
    """

    path: str | None
    script: str
    code: str
    values: dict[str, Any]
    resolved: dict[str, Any]
    asked: str


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping of a recipe file as written, or a `UserError` saying why it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        nearby = sorted(str(p) for p in Path(path).parent.glob("*.yaml"))
        close = difflib.get_close_matches(str(path), nearby, n=1, cutoff=0.5)
        raise UserError(f"{path}: no such recipe{f'; did you mean {close[0]}?' if close else ''}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this recipe: {error}") from None
    try:
        values = load_yaml(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark and problem else one_line(error)
        raise UserError(f"{path}: not valid YAML: {where}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: a recipe is lines of `key: value`")
    return values


def launch_command(path: str | Path) -> list[str]:
    """The words of a recipe's first line, `# accelerate launch [...] src/run_x.py recipes/x.yaml`.

    Raises:
        UserError: when the first line is not such a comment.
    """
    try:
        with open(path, encoding="utf-8") as file:
            words = file.readline().removeprefix("#").split()
    except OSError as error:
        raise UserError(f"{path}: cannot read this recipe: {error.strerror}") from None
    if words[:2] != ["accelerate", "launch"] or not any(word.endswith(".py") for word in words):
        raise UserError(f"{path}: its first line must be `# accelerate launch src/run_<what>.py <this recipe>`")
    return words


def launcher(path: str | Path) -> list[str]:
    """
    What stands before a recipe's script: accelerate where its first line gives it options, else plain Python, since
    one process needs no launcher and starts seconds earlier without.
    """
    words = launch_command(path)
    options = words[2 : next(place for place, word in enumerate(words) if word.endswith(".py"))]
    return ["accelerate", "launch", "--quiet", *options] if options else ["python"]
