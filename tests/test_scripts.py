"""`scripts/`: what each machine would launch, by fake `srun`, `scontrol`, `scancel`, `accelerate` first in PATH."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NODES = ("gpu-a07", "gpu-b11")
FAKES = {
    # Each node's task in turn, with what srun alone sets for it.
    "srun": """
        while [ "${1#--}" != "$1" ]; do echo "$1" >> "$SAID/srun"; shift; done
        echo "cpus=${SRUN_CPUS_PER_TASK:-1}" >> "$SAID/srun"
        for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit $?; done
        while [ -n "${UNTIL_STOPPED:-}" ] && [ ! -e "$SAID/scancel" ]; do sleep 0.02; done
        exit "${SRUN_EXIT:-0}" """,
    "scontrol": """
        if [ "$1 $2" = "show hostnames" ]; then [ "$3" != "gpu-a07,gpu-b11" ] || printf 'gpu-a07\\ngpu-b11\\n'
        else echo "$@" >> "$SAID/scontrol"; fi""",
    "scancel": 'echo "$@" >> "$SAID/scancel"',
    "accelerate": """
        for word in "$@"; do printf '%s\\n' "$word"; done > "$SAID/accelerate-$SLURM_NODEID"
        echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > "$SAID/timeout" """,
}
JOB = {"SLURM_JOB_NODELIST": "gpu-a07,gpu-b11", "SLURM_JOB_ID": "1234567", "SLURM_NNODES": "2"}
JOB |= {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "64"}
RECIPE = "recipes/phase4b.yaml"
Sbatch = Callable[..., subprocess.Popen]


@pytest.fixture
def said(tmp_path: Path) -> Path:
    """Where the fakes write down what they were asked."""
    (tmp_path / "said").mkdir()
    return tmp_path / "said"


@pytest.fixture
def sbatch(tmp_path: Path, said: Path) -> Sbatch:
    """`sbatch(recipe, "--key", "value", without="SLURM_JOB_ID", SRUN_EXIT="1")`: the script as SLURM starts it."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, body in FAKES.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)

    def submit(*words: str, without: str = "", cwd: Path = ROOT, **changes: str) -> subprocess.Popen:
        environment = JOB | {"PATH": f"{programs}:/usr/bin:/bin", "SAID": str(said)} | changes
        environment.pop(without, None)
        command = ["bash", str(ROOT / "scripts/slurm.sh"), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=cwd, env=environment, **pipes)

    return submit


def finished(job: subprocess.Popen) -> tuple[int, str]:
    _, errors = job.communicate(timeout=60)
    return job.returncode, errors


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_slurm_launches_one_run_over_both_machines(sbatch: Sbatch, said: Path) -> None:
    extra = ("--run_name", "two machines, 'quoted' $HOME", "--max_steps", "10")
    assert finished(sbatch(RECIPE, *extra)) == (0, "")
    launched = [(said / f"accelerate-{node}").read_text().splitlines() for node in (0, 1)]
    assert [option(words, "--machine_rank") for words in launched] == ["0", "1"]
    for words in launched:
        assert words[0] == "launch" and option(words, "--config_file") == "accelerate_configs/multi_node.yaml"
        assert option(words, "--num_machines") == "2" and option(words, "--num_processes") == "8", "4 GPUs on each"
        assert option(words, "--main_process_ip") == NODES[0]
        assert option(words, "--main_process_port") == str(20000 + 1234567 % 20000)
        assert tuple(words[-6:]) == ("src/run_pretrain.py", RECIPE, *extra)
    assert "cpus=64" in (said / "srun").read_text(), "srun does not take them from sbatch"
    assert int((said / "timeout").read_text()) > 30, "the launcher's own patience is too short for a large checkpoint"
    assert not (said / "scontrol").exists(), "a finished run is not queued again"


def test_a_run_whose_time_is_up_is_asked_to_stop_and_queued_again(sbatch: Sbatch, said: Path) -> None:
    """The launcher's exit code after a signal is 1, as after any failure: who asked for the stop is what counts."""
    job = sbatch(RECIPE, UNTIL_STOPPED="1", SRUN_EXIT="1")
    while not (said / "accelerate-1").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert finished(job) == (1, "")
    assert (said / "scancel").read_text() == "--signal=TERM 1234567\n"
    assert (said / "scontrol").read_text() == "requeue 1234567\n"


def test_a_run_that_ends_in_its_last_minutes_is_not_queued_again(sbatch: Sbatch, said: Path) -> None:
    job = sbatch(RECIPE, UNTIL_STOPPED="1")
    while not (said / "accelerate-1").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert finished(job) == (0, "") and not (said / "scontrol").exists()


def test_a_run_that_fails_is_not_queued_again(sbatch: Sbatch, said: Path) -> None:
    assert finished(sbatch(RECIPE, SRUN_EXIT="1"))[0] == 1 and not (said / "scontrol").exists()


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        ([RECIPE], {"without": "SLURM_JOB_NODELIST"}, "submit this file with sbatch"),
        ([RECIPE], {"without": "SLURM_JOB_ID"}, "submit this file with sbatch"),
        ([], {}, "name a recipe: sbatch --nodes 2 scripts/slurm.sh recipes/phase4b.yaml"),
        ([RECIPE], {"cwd": Path("/")}, "/: submit from the root of the repository"),
        ([RECIPE], {"SLURM_JOB_NODELIST": "gone"}, "scontrol finds no host in SLURM_JOB_NODELIST=gone"),
        (["recipes/phase9.yaml"], {}, "recipes/phase9.yaml: no such recipe"),
        (["README.md"], {}, "README.md: its first line names no src/run_<what>.py"),
    ],
)
def test_slurm_refuses_in_one_line(words, changes, message: str, sbatch: Sbatch, said: Path) -> None:
    assert finished(sbatch(*words, **changes)) == (2, f"error: {message}\n")
    assert not list(said.glob("accelerate-*"))


def multi_node(*words: str, **changes: str) -> subprocess.CompletedProcess:
    environment = {"PATH": os.environ["PATH"], "PRINT": "1", "GPUS_PER_MACHINE": "4"} | changes
    command = ["sh", "scripts/multi_node.sh", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_multi_node_script_prints_the_command_of_each_machine() -> None:
    expected = "accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines 3 --num_processes 12"
    expected += " --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29500"
    done = multi_node("1", "3", "10.0.0.1", RECIPE, "--max_steps", "10")
    assert done.stdout.strip() == f"{expected} src/run_pretrain.py {RECIPE} --max_steps 10"


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        (("3", "3", "10.0.0.1", RECIPE), {}, "machine rank 3 must be below 3"),
        (("first", "3", "10.0.0.1", RECIPE), {}, "'first' is no number; give <machine rank> <number of machines>"),
        (("0", "2", "10.0.0.1", RECIPE), {"GPUS_PER_MACHINE": "all"}, "'all' is no number; give "),
        (("0", "2", "", RECIPE), {}, "the address of machine 0 is empty"),
        (("0", "2", "10.0.0.1", "recipes/phase9.yaml"), {}, "recipes/phase9.yaml: no such recipe"),
    ],
)
def test_the_multi_node_script_refuses_in_one_line(words, changes, message: str) -> None:
    done = multi_node(*words, **changes)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and len(done.stderr.splitlines()) == 1
    assert "multi_node.sh <machine rank>" in multi_node("0", "2").stderr
