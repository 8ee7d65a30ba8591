"""The real commands in two processes, as the tiny family runs them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from adamba.training.checkpoints import fault
from tiny_runs import DATA, ROOT, TRAIN, runner, save_hybrid, tensors, write_recipe

pytestmark = pytest.mark.smoke
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
LAUNCH += ["--config_file", str(ROOT / "accelerate_configs/ddp_cpu.yaml")]


def launch(folder: Path, script: str, *arguments: str) -> str:
    command = [*LAUNCH, str(ROOT / "src" / script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hybrid`, and `trained` from it by four elastic steps in two processes."""
    folder = tmp_path_factory.mktemp("two")
    save_hybrid(folder / "hybrid")
    # The router runs beside the wrapped forward, once for each of several passes.
    elastic = {"elastic": True, "num_sampled_widths": 2, "model_name_or_path": "hybrid", "output_dir": "trained"}
    write_recipe(folder / "phase2.yaml", TRAIN | elastic | {"per_device_train_batch_size": 2})
    launch(folder, "run_pretrain.py", "phase2.yaml")
    return folder


def test_elastic_training(trained: Path) -> None:
    metrics = json.loads((trained / "trained/metrics.json").read_text())
    assert metrics["tokens_seen"] == 4 * 4 * 64, "the tokens of both processes"
    before, after = tensors(trained / "hybrid"), tensors(trained / "trained")
    for part in ("router", "exit_gates", "mixer", "self_attn"):
        assert any(not before[name].equal(after[name]) for name in before if part in name), part


def test_evaluation_shares_the_episodes(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    for name in ("one", "two"):
        shutil.copytree("trained", name)
    games = {"num_rows": 4, "exit_thresholds": [1.0], "num_episodes": {"calculator": 3, "tic_tac_toe": 2}}
    write_recipe(trained / "eval.yaml", DATA | games | {"max_new_tokens": 8, "use_cpu": True})
    runner(monkeypatch)("run_eval.py", "eval.yaml", "--model_name_or_path", "one")
    output = launch(trained, "run_eval.py", "eval.yaml", "--model_name_or_path", "two")
    assert output.count("held-out loss") == 1, "two processes that know of each other have one that reports"
    one, two = (json.loads((trained / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one.keys() == two.keys() and "loss_rate_tic_tac_toe_perfect" in two
    for key in one.keys() - {"eval_seconds"}:
        assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), key


def test_a_signal_to_the_launcher_and_its_processes_saves_first(trained: Path) -> None:
    """As SLURM sends it, to all of them; the launcher passes it on, so the training processes hear it twice."""
    write_recipe(
        trained / "long.yaml", TRAIN | {"model_name_or_path": "hybrid", "max_steps": 10**6, "logging_steps": 1}
    )
    command = [*LAUNCH, str(ROOT / "src/run_pretrain.py"), "long.yaml", "--output_dir", "long"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=trained, env=environment, **pipes) as launcher:
        said = []
        for line in launcher.stdout:
            said.append(line)
            if "'loss'" in line and not any("'loss'" in before for before in said[:-1]):
                launched = psutil.Process(launcher.pid)
                for process in [*launched.children(recursive=True), launched]:
                    process.send_signal(signal.SIGTERM)
    assert launcher.returncode != 0 and "stopped by SIGTERM after step" in "".join(said), said
    (checkpoint,) = (trained / "long.trainer").glob("*/checkpoint-*")
    assert fault(checkpoint) is None
