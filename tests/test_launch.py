"""Ways to launch: what does not fit the machine is refused; configs that need GPUs are parsed and dry-run here."""

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from adamba import launch
from adamba.errors import UserError
from adamba.launch import check_launch
from adamba.model import AdambaForCausalLM

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("environment", "num_gpus", "message"),
    [
        (
            {"LOCAL_WORLD_SIZE": "8"},
            0,
            "8 processes on this machine, which has 0 GPUs; use accelerate_configs/cpu.yaml",
        ),
        ({"LOCAL_WORLD_SIZE": "8"}, 4, "8 processes on this machine, which has 4 GPUs; use --num_processes 4"),
        ({"ACCELERATE_USE_FSDP": "true"}, 0, "1 processes on this machine, which has 0 GPUs"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "LOCAL_WORLD_SIZE": "8"}, 8, "DeepSpeed is not installed"),
    ],
)
def test_a_launch_that_does_not_fit_is_one_line(environment, num_gpus, message, monkeypatch) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"accelerate config: {message}") as error:
        check_launch(environment, num_gpus)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("environment", "num_gpus"),
    [
        ({}, 0),
        ({"LOCAL_WORLD_SIZE": "1"}, 0),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "True"}, 0),
        ({"LOCAL_WORLD_SIZE": "8", "ACCELERATE_USE_FSDP": "true"}, 8),
    ],
)
def test_a_launch_that_fits_passes(environment, num_gpus) -> None:
    check_launch(environment, num_gpus)


def test_a_recipe_for_the_cpu_needs_no_gpu() -> None:
    check_launch({"LOCAL_WORLD_SIZE": "2"}, 0, use_cpu=True)


def test_scripts_ask_before_anything_else(monkeypatch, capsys) -> None:
    import run_pretrain

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr("sys.argv", ["run_pretrain.py", str(ROOT / "recipes/tiny/phase1.yaml"), "--use_cpu", "false"])
    with pytest.raises(SystemExit) as stopped:
        run_pretrain.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: accelerate config: 64 processes on this machine, which has ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_becomes_the_environment_of_its_processes(path: Path, monkeypatch) -> None:
    """A dry run: what accelerate would hand each process. Those with GPUs start nowhere here."""
    config = load_config_from_file(str(path))
    words = ["--config_file", str(path), "--main_process_port", "0", "src/run_pretrain.py", "recipes/phase1.yaml"]
    if config.distributed_type == "DEEPSPEED":
        plugin_keys = dict(config.deepspeed_config)
        stage = int(path.stem[4]) if path.stem.startswith("zero") else 2
        assert plugin_keys["zero_stage"] == stage and config.mixed_precision == "bf16"
        offload = "cpu" if path.stem.endswith("offload") else "none"
        assert plugin_keys["offload_optimizer_device"] == plugin_keys["offload_param_device"] == offload
        # The plugin refuses what it does not know; it needs no GPU to be made, only the library.
        pytest.importorskip("deepspeed", reason="pip install deepspeed")
        plugin = DeepSpeedPlugin(zero_stage=stage, offload_optimizer_device=offload, offload_param_device=offload)
        assert plugin.deepspeed_config["zero_optimization"]["stage"] == stage
        return
    args = launch_command_parser().parse_args(words)
    args, *_ = _validate_launch_command(args)
    environment = prepare_multi_gpu_env(args)
    assert int(args.nproc_per_node) == config.num_processes
    assert environment.get("ACCELERATE_USE_FSDP") == ("true" if path.stem == "fsdp2" else None)
    if path.stem == "fsdp2":
        for key, value in environment.items():
            if key.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
                monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
        assert set(plugin.transformer_cls_names_to_wrap) == set(AdambaForCausalLM._no_split_modules)


def test_the_multi_node_script_prints_the_command_of_each_machine() -> None:
    environment = {"PATH": os.environ["PATH"], "PRINT": "1", "GPUS_PER_MACHINE": "4"}

    def run(*words: str) -> subprocess.CompletedProcess:
        command = ["sh", "scripts/multi_node.sh", *words]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    done = run("1", "3", "10.0.0.1", "recipes/phase4b.yaml", "--max_steps", "10")
    expected = "accelerate launch --config_file accelerate_configs/multi_node.yaml --num_machines 3 --num_processes 12"
    expected += " --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29500"
    assert done.stdout.strip() == f"{expected} src/run_pretrain.py recipes/phase4b.yaml --max_steps 10"
    assert "must be below 3" in run("3", "3", "10.0.0.1", "recipes/phase4b.yaml").stderr
    assert run("0", "2").returncode == 2 and "multi_node.sh <machine rank>" in run("0", "2").stderr


def test_the_slurm_script_is_a_script_and_refuses_to_run_outside_of_slurm() -> None:
    path = ROOT / "scripts/slurm.sh"
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", str(path), "x"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "submit this file with sbatch" in done.stderr
