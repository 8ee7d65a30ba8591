"""A kept help page: shown without the heavy imports, and only for the very code that it describes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adamba import help_page


@pytest.fixture
def script(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "run_x.py"
    path.write_text("print('ran')")
    return path


def test_a_page_is_shown_on_demand_until_the_script_changes(script: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    help_page.show_kept_page(script)  # nothing kept yet: the script goes on
    help_page.keep_page(script, "usage: run_x.py\n")
    with pytest.raises(SystemExit) as stopped:
        help_page.show_kept_page(script)
    assert stopped.value.code == 0 and capsys.readouterr().out == "usage: run_x.py\n"
    monkeypatch.setattr(sys, "argv", [str(script), "recipe.yaml"])
    help_page.show_kept_page(script)
    monkeypatch.setattr(sys, "argv", [str(script), "-h"])
    script.write_text("print('ran otherwise')")
    help_page.show_kept_page(script)
    assert capsys.readouterr().out == ""
    help_page.keep_page(script, "usage: new\n")
    assert [page.read_text() for page in (script.parent / "cache/adamba/help").iterdir()] == ["usage: new\n"]


def test_a_cache_that_cannot_be_written_is_no_error(script: Path, monkeypatch) -> None:
    (script.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(script.parent / "file"))
    help_page.keep_page(script, "usage: run_x.py\n")
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    help_page.show_kept_page(script)


def test_scripts_show_their_page_before_torch_is_imported(tmp_path: Path) -> None:
    source = Path(help_page.__file__).parents[1]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "100", "PYTHONPATH": str(source)}
    scripts = [file for file in source.glob("run_*.py") if "adamba.recipe import" in file.read_text()]
    assert len(scripts) > 8
    program = """
import os, runpy, sys
sys.modules["torch"] = None  # importing it would fail
from adamba import help_page
for script in sys.argv[1:]:
    help_page.keep_page(script, f"page of {os.path.basename(script)}\\n")
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stopped:
        assert stopped.code == 0
"""
    words = [sys.executable, "-c", program, *map(str, scripts)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"page of {script.name}" for script in scripts]
