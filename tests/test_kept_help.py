"""A script's kept `--help`: the same text as a fresh one, or nothing."""

import ast
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adamba import kept_help
from adamba.kept_help import KeepingParser, kept_file, print_kept_help

SOURCE = Path(__file__).parents[1] / "src"
SCRIPTS = sorted(path.name for path in SOURCE.glob("run_*.py") if path.name != "run_demo.py")  # which imports little


def show_help(prog: str = "run_it.py", text: str = "of a key — in full") -> None:
    parser = KeepingParser(prog=prog)
    parser.add_argument("--key", help=text)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(sys.argv[1:])
    assert stop.value.code == 0


def kept_names(script: Path) -> list[str]:
    return sorted(path.name for path in (script.parent / "cache" / "adamba").iterdir())


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script that was started with `--help`, on a machine whose packages are in one folder."""
    path = tmp_path / "run_it.py"
    path.write_text("main()\n")
    (tmp_path / "packages" / "torch-2.12.0.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages")])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.setattr(kept_help, "PACKAGE", tmp_path / "adamba")
    (tmp_path / "adamba").mkdir()
    (tmp_path / "adamba" / "fields.py").write_text("steps: int = 1\n")
    return path


def test_the_kept_text_is_the_fresh_one(script, capsys):
    print_kept_help()  # nothing is kept yet
    assert capsys.readouterr().out == ""
    show_help()
    fresh = capsys.readouterr().out
    assert "of a key — in full" in fresh
    with pytest.raises(SystemExit) as stop:
        print_kept_help()
    assert stop.value.code == 0
    assert capsys.readouterr().out == fresh
    assert kept_names(script) == ["help-run_it-110.txt", "help-run_it-80.txt"]


@pytest.mark.parametrize(("terminal", "longest"), [(40, 78), (80, 78), (109, 78), (110, 108), (300, 108)])
def test_a_help_fits_the_terminal_without_being_asked_for_at_its_width(script, capsys, monkeypatch, terminal, longest):
    show_help(text="word " * 100)
    monkeypatch.setenv("COLUMNS", str(terminal))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        print_kept_help()
    kept = capsys.readouterr().out
    assert longest - 5 < max(map(len, kept.splitlines())) <= longest
    show_help(text="word " * 100)
    assert capsys.readouterr().out == kept
    assert os.environ["COLUMNS"] == str(terminal)


CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    "script": lambda folder, _: (folder / "run_it.py").write_text("main(1)\n"),
    "fields": lambda folder, _: (folder / "adamba" / "fields.py").write_text("steps: int = 2\n"),
    "version": lambda folder, _: next((folder / "packages").iterdir()).rename(
        folder / "packages/torch-2.13.0.dist-info"
    ),
    "package": lambda folder, _: (folder / "packages" / "kernels-0.10.dist-info").mkdir(),
    "path": lambda folder, patch: patch.setattr(sys, "path", [*sys.path, str(folder)]),
    "python": lambda folder, patch: patch.setattr(sys, "version", "3.99"),
    "colours": lambda folder, patch: patch.setenv("FORCE_COLOR", "1"),
    "words": lambda folder, patch: patch.setattr(sys, "argv", [str(folder / "run_it.py"), "recipe.yaml", "--help"]),
    "run": lambda folder, patch: patch.setattr(sys, "argv", [str(folder / "run_it.py")]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_text_is_not_printed(script, capsys, monkeypatch, change):
    if change == "colours":
        monkeypatch.setattr(sys, "version_info", (3, 14))  # from which on argparse has colours
    show_help()
    capsys.readouterr()
    CHANGES[change](script.parent, monkeypatch)
    print_kept_help()
    assert capsys.readouterr().out == ""


def test_a_stale_text_is_replaced(script, capsys):
    show_help()
    script.write_text("main(1)\n")
    show_help(text="another")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        print_kept_help()
    assert "another" in capsys.readouterr().out
    assert len(kept_names(script)) == 2


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"no digest", "cut", "changed", "folder"])
def test_a_damaged_file_is_made_anew(script, capsys, damage):
    show_help()
    fresh = capsys.readouterr().out
    whole = kept_file(110).read_bytes()
    if damage == "folder":
        kept_file(110).unlink()
        kept_file(110).mkdir()
    else:
        kept_file(110).write_bytes({"cut": whole[:-9], "changed": whole.replace(b"key", b"kex")}.get(damage, damage))
    print_kept_help()
    assert capsys.readouterr().out == ""
    show_help()
    assert capsys.readouterr() == (fresh, "")
    assert damage == "folder" or kept_file(110).read_bytes() == whole


@pytest.mark.parametrize("reason", ["not a folder", "no home", "no script"])
def test_where_nothing_can_be_kept_the_help_is_shown_all_the_same(script, capsys, monkeypatch, reason):
    if reason == "not a folder":
        monkeypatch.setenv("XDG_CACHE_HOME", str(script))
    elif reason == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: Path("~nobody_here").expanduser())
    else:
        script.unlink()
    print_kept_help()
    show_help()
    printed = capsys.readouterr()
    assert "of a key" in printed.out
    assert printed.err == ""


def test_a_folder_without_the_right_to_write(script, capsys, monkeypatch):
    def refuse(file: Path, text: str) -> None:  # what a folder of mode 500 says, to root too
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(kept_help, "write_whole", refuse)
    show_help()
    assert "of a key" in capsys.readouterr().out
    assert not kept_file(110).exists()


@pytest.mark.parametrize("given", ["", "relative/cache"])
def test_without_a_cache_folder_of_its_own_it_is_the_usual_one(script, monkeypatch, given):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(script.parent))
    assert kept_file(110) == script.parent / ".cache" / "adamba" / "help-run_it-110.txt"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_looks_before_it_imports(name):
    _, kept, guard, *_ = ast.parse((SOURCE / name).read_text()).body
    assert isinstance(kept, ast.ImportFrom) and kept.module == "adamba.kept_help"
    assert ast.unparse(guard) == "if __name__ == '__main__':\n    print_kept_help()"


@pytest.mark.smoke
def test_the_second_help_of_a_script_is_the_first_without_its_imports(tmp_path):
    command = [sys.executable, "-X", "importtime", str(SOURCE / "run_sft.py"), "--help"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(SOURCE)}

    def run(words: list[str]) -> subprocess.CompletedProcess:
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True)

    first, second = run(command), run(command)
    assert second.stdout == first.stdout
    assert first.stdout.startswith("usage: run_sft.py")
    assert " torch\n" in first.stderr
    for module in ("torch", "yaml", "trl", "numpy"):
        assert f" {module}\n" not in second.stderr

    kept = {path: path.read_bytes() for path in (tmp_path / "adamba").iterdir()}
    shutil.rmtree(tmp_path / "adamba")  # what `make setup` keeps is what asking for it keeps
    made = run([sys.executable, "-m", "adamba.kept_help", str(SOURCE / "run_sft.py")])
    assert (made.stdout, {path: path.read_bytes() for path in (tmp_path / "adamba").iterdir()}) == ("", kept)


def test_a_parser_of_other_words_keeps_nothing(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(script), "show", "--help"])
    parser = KeepingParser()
    parser.add_subparsers().add_parser("show")
    with pytest.raises(SystemExit):
        parser.parse_args(sys.argv[1:])
    assert not kept_file(110).exists()


def test_an_interrupt_during_the_imports_ends_in_silence(tmp_path):
    program = "from adamba.kept_help import print_kept_help\nprint_kept_help()\nraise {}"
    done = [
        subprocess.run([sys.executable, "-c", program.format(error)], capture_output=True, text=True)
        for error in ("KeyboardInterrupt", "ValueError('shown')")
    ]
    assert (done[0].returncode, done[0].stdout, done[0].stderr) == (-signal.SIGINT, "", "")
    assert done[1].returncode == 1 and "Traceback" in done[1].stderr and "shown" in done[1].stderr
