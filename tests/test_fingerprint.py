"""Fingerprints change with what a run depends on, and with nothing else."""

import json
from pathlib import Path

import pytest

from adamba.fingerprint import code_files, fingerprint_code, fingerprint_input, run_fingerprint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A script that imports a.b (which imports .c, which imports the script's sibling d) and not `unused`."""
    (tmp_path / "a").mkdir()
    files = {
        "run_x.py": "import json\nfrom a.b import thing\n",
        "a/__init__.py": "",
        "a/b.py": "def thing():\n    from . import c\n",
        "a/c.py": "from .d import x\nimport torch.nothing\n",
        "a/d.py": "x = 1\n",
        "a/unused.py": "y = 1\n",
        "a/table.json": "{}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_code_files_follows_imports_only(source):
    names = {path.relative_to(source).as_posix() for path in code_files(source / "run_x.py")}
    assert names == {"run_x.py", "a/__init__.py", "a/b.py", "a/c.py", "a/d.py", "a/table.json"}


def test_code_changes_count_when_imported(source):
    script = source / "run_x.py"
    before = fingerprint_code(script)
    (source / "a/unused.py").write_text("y = 2222\n")
    assert fingerprint_code(script) == before
    (source / "a/d.py").write_text("x = 2222\n")
    assert fingerprint_code(script) != before


def test_recipe_keys_without_effect_and_paths_do_not_count():
    def fingerprint(**values):
        return run_fingerprint("code", values, {"model": "checkpoints/a"})["fingerprint"]

    base = fingerprint(max_steps=3, learning_rate=1.0, model="checkpoints/a")
    assert fingerprint(max_steps=3, learning_rate=1, model="checkpoints/a", output_dir="x", logging_steps=7) == base
    assert fingerprint(learning_rate=1.0, max_steps=3) == base
    assert fingerprint(max_steps=4, learning_rate=1.0) != base
    assert fingerprint(max_steps=3, learning_rate=1.5) != base
    assert fingerprint(max_steps=3, learning_rate=1.0, seed=1) != base
    # the order inside a mapping may decide the order of draws
    assert fingerprint(mix={"a": 1, "b": 1}) != fingerprint(mix={"b": 1, "a": 1})


def test_inputs_count_by_content(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("1\n")
    parts = run_fingerprint("code", {}, {"data": str(folder)})
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    (copy / "rows.jsonl").write_text("1\n")
    assert run_fingerprint("code", {}, {"data": str(copy)}) == parts
    (copy / "rows.jsonl").write_text("2\n")
    changed = run_fingerprint("code", {}, {"data": str(copy)})
    assert changed["inputs"] != parts["inputs"] and changed["recipe"] == parts["recipe"]
    assert fingerprint_input("org/model") != fingerprint_input("org/other")
    assert fingerprint_input(folder / "rows.jsonl") != fingerprint_input(copy / "rows.jsonl")


def test_published_input_answers_from_its_record(tmp_path):
    run = {"files": {"model.safetensors": {"bytes": 1, "sha256": "aa"}}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    before = fingerprint_input(tmp_path)
    (tmp_path / "metrics.json").write_text("{}")
    assert fingerprint_input(tmp_path) == before
    run["files"]["model.safetensors"]["sha256"] = "bb"
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert fingerprint_input(tmp_path) != before
