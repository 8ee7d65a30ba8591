"""The Makefile: what it lists exists, and an unusable Python gets a clear line."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def make(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    # MAKEFLAGS and MAKELEVEL of the `make test` this runs under would change what the inner make prints
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments], cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False
    )


def test_help_is_the_default_and_lists_every_target():
    done = make()
    listed = set(re.findall(r"^  ([a-z0-9-]+) {2,}\S", done.stdout, re.MULTILINE))
    assert {"setup", "demo", "test", "quality", "clean", *(f"phase{i}" for i in range(7))} <= listed


def test_every_script_a_target_names_exists():
    for script in re.findall(r"src/\w+\.py", (ROOT / "Makefile").read_text()):
        assert (ROOT / script).is_file(), script


def test_phase_prints_and_runs_the_recipes_own_command(project):
    (project / "run_x.py").write_text("import sys; print('ran', sys.argv[1:])")
    recipes = project / "recipes/tiny"
    recipes.mkdir(parents=True)
    for phase in ("3a", "3b"):
        (recipes / f"phase{phase}.yaml").write_text(f"# accelerate launch run_x.py phase{phase}\n# CPU\nkey: 1\n")
    done = make("phase3", "RECIPES=recipes/tiny", "ARGS=--max_steps 3", cwd=project)
    assert done.stdout.splitlines() == [
        "python run_x.py phase3a --max_steps 3",
        "ran ['phase3a', '--max_steps', '3']",
        "python run_x.py phase3b --max_steps 3",
        "ran ['phase3b', '--max_steps', '3']",
    ], done.stderr
    done = make("phase5", "RECIPES=recipes/tiny", cwd=project)
    assert done.returncode != 0 and "error: recipes/tiny/phase5.yaml: no such recipe" in done.stderr


def test_launcher_that_is_given_replaces_the_recipes_accelerate_config(project):
    (project / "run_x.py").write_text("")
    (project / "recipes").mkdir()
    first = "# accelerate launch --config_file accelerate_configs/ddp.yaml run_x.py recipes/phase1.yaml\n"
    (project / "recipes/phase1.yaml").write_text(first)
    done = make("phase1", "LAUNCH=echo launch --config_file mine.yaml", cwd=project)
    assert done.stdout.splitlines()[0] == "echo launch --config_file mine.yaml run_x.py recipes/phase1.yaml"
    (project / ".venv/bin").mkdir(parents=True, exist_ok=True)
    accelerate = project / ".venv/bin/accelerate"
    accelerate.write_text('#!/bin/sh\necho "got $*"\n')
    accelerate.chmod(0o755)
    done = make("phase1", "ARGS=--max_steps 2", cwd=project)
    expected = "launch --quiet --config_file accelerate_configs/ddp.yaml run_x.py recipes/phase1.yaml --max_steps 2"
    assert done.stdout.splitlines() == [f"accelerate {expected}", f"got {expected}"], done.stderr
    (project / "recipes/phase1.yaml").write_text(
        "# accelerate launch --num_processes 4 run_x.py recipes/phase1.yaml\n"
    )
    done = make("phase1", cwd=project)
    assert done.stdout.splitlines()[1:] == ["got launch --quiet --num_processes 4 run_x.py recipes/phase1.yaml"]


def test_eval_takes_a_checkpoint_and_measures_the_tiny_family_by_default():
    done = make("--dry-run", "eval", "CHECKPOINT=checkpoints/tiny/phase2", RECIPES="")
    assert "run_eval.py recipes/tiny/eval.yaml --model_name_or_path checkpoints/tiny/phase2" in done.stdout
    for name, recipe in (("phase5", "phase5_eval"), ("phase6_dpo", "eval_agents")):
        done = make("--dry-run", "eval", f"CHECKPOINT=checkpoints/tiny/{name}", RECIPES="")
        expected = f"run_eval.py recipes/tiny/{recipe}.yaml --model_name_or_path checkpoints/tiny/{name}"
        assert expected in done.stdout
    assert "run_eval.py recipes/smollm2/eval.yaml" in make("--dry-run", "eval", "RECIPES=recipes/smollm2").stdout


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("CHECKPOINT=checkpoints/tiny/phase5/", "run_eval.py recipes/tiny/phase5_eval.yaml"),
        ("CHECKPOINT=runs/phase5_tries/phase2", "run_eval.py recipes/tiny/eval.yaml"),
        ("RECIPES=recipes/games CHECKPOINT=checkpoints/games/sudoku_1_sft", "run_games.py recipes/games/eval.yaml"),
    ],
)
def test_eval_is_that_of_the_run_whatever_the_path_around_it(words, command):
    assert command in make("--dry-run", "eval", *words.split()).stdout


def test_a_dry_run_of_the_tests_runs_none(project):
    (project / ".venv/bin").mkdir(parents=True, exist_ok=True)
    (project / ".venv/bin/python").write_text("#!/bin/sh\ntouch was_run\n")
    (project / ".venv/bin/python").chmod(0o755)
    done = make("--dry-run", "test", cwd=project)
    assert "pytest" in done.stdout and not (project / "was_run").exists()


def test_failing_phase_fails_the_target(project):
    (project / "run_x.py").write_text("raise SystemExit(2)")
    (project / "recipes").mkdir()
    (project / "recipes/phase5.yaml").write_text("# accelerate launch run_x.py recipes/phase5.yaml\n")
    assert make("phase5", "LAUNCH=python", cwd=project).returncode != 0


def test_setup_refuses_an_old_python_in_one_line(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "constraints.txt").touch()
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "make", "head", "touch"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    old = tools / "python3"
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo "Python 3.10.13"; else exit 1; fi\n')
    old.chmod(0o755)
    done = make("setup", cwd=tmp_path, PATH=str(tools))
    assert done.returncode != 0
    assert "error: Adamba needs Python 3.11 or newer; python3 is Python 3.10.13." in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_clean_keeps_paid_checkpoints(project):
    for name in (
        "checkpoints/tiny/base",
        "checkpoints/phase5",
        "reports/tiny",
        "logs/tiny",
        "src/a/__pycache__",
        "tests",
    ):
        (project / name).mkdir(parents=True)
    assert make("clean", cwd=project).returncode == 0
    assert (project / "checkpoints/phase5").is_dir() and not (project / "checkpoints/tiny").exists()
    assert not (project / "reports/tiny").exists() and not (project / "src/a/__pycache__").exists()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder whose environment counts as installed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "constraints.txt").touch()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.installed").touch()
    return tmp_path
