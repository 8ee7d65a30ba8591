"""Every recipe is parsed by the script its first line names, so a stale key fails here and not on a rented GPU."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from adamba.recipe_file import launch_command, read_recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml"))


class ParsedError(Exception):
    """Carries what the script parsed, in place of the run."""


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES)
def test_recipe_parses_with_its_own_script(path, at_root, monkeypatch):
    words = launch_command(path)
    script, *arguments = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    assert arguments and arguments[0] == path, "the first line must launch this very recipe"
    for name in (word for word in words if word.startswith("accelerate_configs/")):
        assert Path(name).is_file(), f"{name} does not exist"
    module = importlib.import_module(Path(script).stem)

    def parse(*dataclass_types: type) -> None:
        # the bf16 and tf32 of a GPU recipe are refused on a machine without one
        on_cpu = ["--use_cpu", "true", "--bf16", "false"] if _has_field(dataclass_types, "bf16") else []
        on_cpu += ["--tf32", "false"] if "tf32" in read_recipe(path) else []
        raise ParsedError(real_parse(*dataclass_types, argv=[*arguments, *on_cpu]))

    real_parse = module.parse
    monkeypatch.setattr(module, "parse", parse)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(ParsedError) as caught:
        module.main()
    *_, recipe = caught.value.args[0]
    assert recipe.path == path


@pytest.mark.parametrize("path", RECIPES)
def test_second_line_names_hardware_time_and_memory(path):
    line = (ROOT / path).read_text(encoding="utf-8").splitlines()[1]
    assert line.startswith("# "), "the second line is a comment: hardware, time, peak memory"
    assert re.search(r"CPU|GPU|H200|H100|A100", line), f"no hardware in: {line}"
    assert re.search(r"\d+ ?(s|seconds?|minutes?|min|h|hours?)\b", line), f"no time in: {line}"
    assert re.search(r"\d ?(GiB|MiB|GB|MB)\b", line), f"no memory in: {line}"


@pytest.mark.parametrize("path", RECIPES)
def test_output_goes_to_the_familys_own_folder(path):
    output_dir: Any = read_recipe(ROOT / path).get("output_dir")
    if output_dir is not None:
        family = Path(path).parent.name
        expected = "reports" if Path(path).stem == "report" else "checkpoints"
        assert Path(output_dir).parts[0] == expected
        assert family == "recipes" or family in Path(output_dir).parts


def _has_field(dataclass_types: tuple[type, ...], name: str) -> bool:
    return any(name in getattr(dataclass_type, "__dataclass_fields__", {}) for dataclass_type in dataclass_types)
