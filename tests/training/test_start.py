"""What stops a run in one line before anything expensive: nothing is loaded, and nothing is played."""

import json
from pathlib import Path

import pytest

import run_grpo
from adamba.training import session
from adamba.training.caps import SPENT_FILE
from tiny_runs import GRPO, runner, write_recipe


def use_up(folder: Path) -> None:
    (folder / SPENT_FILE).write_text(json.dumps({"seconds": 7200.0, "step_seconds": 60.0}))


@pytest.fixture
def refused(tmp_path: Path, monkeypatch, capsys):
    """Start GRPO, which plays before it trains; returns its one line. `prepare` sees the folder of its checkpoints."""

    def run(prepare=lambda folder: None, **keys) -> str:
        def trainer_dir(*args, original=session.trainer_dir):
            folder = original(*args)
            folder.mkdir(parents=True)
            prepare(folder)
            return folder

        monkeypatch.setattr(session, "trainer_dir", trainer_dir)
        monkeypatch.setattr(run_grpo, "load_model_and_tokenizer", lambda *_, **__: pytest.fail("a model was loaded"))
        recipe = GRPO | {"model_name_or_path": "model", "output_dir": str(tmp_path / "out")} | keys
        with pytest.raises(SystemExit) as stopped:
            runner(monkeypatch)("run_grpo.py", write_recipe(tmp_path / "x.yaml", recipe))
        assert stopped.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return run


def test_a_cap_that_is_used_up(refused) -> None:
    assert "max_hours: 2 is used up (2 h so far); raise it to go on from" in refused(use_up, max_hours=2.0)


def test_a_checkpoint_of_another_recipe(refused, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    session.sign(theirs, {"code": "c", "inputs": "i", "values": GRPO | {"learning_rate": 0.5}, "rows_per_step": 8})
    line = refused(resume_from_checkpoint=str(theirs))
    assert f"resume_from_checkpoint: {theirs} is of another run (" in line
    assert "learning_rate: 0.5 there, 0.001 here" in line and "other code" in line


def test_a_checkpoint_that_is_not_there(refused) -> None:
    assert "resume_from_checkpoint: nowhere: no such folder" in refused(resume_from_checkpoint="nowhere")


def test_a_key_of_the_libraries_that_no_loss_here_reads(refused) -> None:
    assert "label_smoothing_factor: 0.1 would change nothing" in refused(label_smoothing_factor=0.1)
