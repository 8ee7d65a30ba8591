"""
A run in several processes of one machine, as `accelerate launch` starts them, without the seconds that it takes.

Processes are forked from this one, whose imports are done. Their environment is what accelerate makes of the file in
`accelerate_configs/`, so the files that users name are what is run; `smoke/test_two_processes.py` takes the launcher's
way.
"""

import argparse
import gc
import json
import logging
import multiprocessing
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from unittest.mock import MagicMock, patch

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from tiny_runs import ROOT, TRAIN, save_hybrid, tensors, write_recipe

torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork: a child would wait for them

STEPS = 20
ELASTIC = TRAIN | {
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": STEPS // 2,
    "elastic": True,
    "learning_rate": 1.0e-3,
}


def write_elastic_recipe(folder: Path) -> None:
    """`recipe.yaml` and the hybrid that it trains, elastic, so widths and exits are drawn in every step."""
    save_hybrid(folder / "model")
    recipe = {key: value for key, value in ELASTIC.items() if key != "per_device_train_batch_size"}
    write_recipe(folder / "recipe.yaml", recipe | {"model_name_or_path": str(folder / "model")})


def launched(config: str, *words: str) -> tuple[argparse.Namespace | None, dict[str, str]]:
    """
    What `accelerate launch --config_file accelerate_configs/<config>.yaml <words>` would start on this machine: the
    options of torchrun (none for a single process), and what accelerate sets in the environment of each process.
    """
    path = ROOT / "accelerate_configs" / f"{config}.yaml"
    options = ["--config_file", str(path), "--main_process_port", "0", *words, "src/run_pretrain.py"]
    seen: list[tuple[argparse.Namespace | None, dict[str, str]]] = []

    def record(args: argparse.Namespace | None, environment: Mapping[str, str] = os.environ) -> None:
        names = ("ACCELERATE_", "FSDP_")
        seen.append((args, {key: value for key, value in environment.items() if key.startswith(names)}))

    def record_one(command: list[str], env: Mapping[str, str]) -> MagicMock:
        record(None, env)
        return MagicMock(returncode=0)

    with patch("torch.distributed.run.run", record), patch("subprocess.Popen", record_one):
        launch_command(launch_command_parser().parse_args(options))
    return seen[0]


def environment_on_cpu(config: str) -> dict[str, str]:
    """
    The same with gloo instead of GPUs. `ACCELERATE_USE_CPU` would make accelerate run DDP where sharding was asked
    for, so only the DDP configs get it; the others go by the recipe's `use_cpu`.
    """
    _, environment = launched(config, "--num_processes", "2", "--mixed_precision", "no")
    if "ACCELERATE_USE_DEEPSPEED" in environment:
        return environment
    if "ACCELERATE_USE_FSDP" in environment:
        return environment | {"ACCELERATE_TORCH_DEVICE": "cpu"}
    return environment | {"ACCELERATE_USE_CPU": "true"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def compile_nothing() -> None:
    """DeepSpeed would compile a shared-memory operation for gloo (77 s), and its own Adam for an offloaded state."""
    import accelerate.accelerator
    from deepspeed.runtime.engine import DeepSpeedEngine

    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # as an attribute it is hidden by torch itself
    accelerate.accelerator.map_pytorch_optim_to_deepspeed = lambda optimizer: optimizer
    DeepSpeedEngine.zero_force_ds_cpu_optimizer = lambda self: False


def load_deepspeed() -> None:
    """Before the forks, and without torch's compiler, which one optimizer of DeepSpeed would load (8 s, unused)."""
    with patch("torch.compile", lambda model=None, **_: model if model is not None else lambda function: function):
        for name in ("muon.original_muon", "stage_1_and_2", "stage3"):
            import_module(f"deepspeed.runtime.zero.{name}")


def shard_on_the_cpu() -> None:
    """accelerate knows FSDP only beside GPUs: where it asks for the backend, gloo answers in NCCL's name."""
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)


def rank_main(script: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """What one process of a launch does."""
    with log.open("w") as file:
        sys.stdout = sys.stderr = file  # and pytest's own handlers go
        logging.basicConfig(stream=file, format="%(message)s", force=True)
        os.environ.update(environment)
        torch.set_num_threads(1)
        gc.freeze()  # what was imported before the fork: a collection would walk and copy all of it
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        if "ACCELERATE_USE_DEEPSPEED" in environment:
            compile_nothing()
        if "ACCELERATE_USE_FSDP" in environment:
            shard_on_the_cpu()
        sys.argv = [str(ROOT / "src" / script), *arguments]
        try:
            import_module(script.removesuffix(".py")).main()
        except Exception:
            traceback.print_exc()
            raise
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def launch(
    num_processes: int,
    folder: Path,
    *arguments: str | Path,
    config: str | None = None,
    rows: int = 4,
    script: str = "run_pretrain.py",
) -> str:
    """
    Run a script in so many processes, by an accelerate config or (one process) without; returns the first one's
    output. Each step sees `rows` rows.
    """
    context, port, processes, logs = multiprocessing.get_context("fork"), free_port(), [], []
    words = [*map(str, arguments), "--per_device_train_batch_size", str(rows // num_processes)]
    environment = {} if config is None else environment_on_cpu(config)
    if "ACCELERATE_USE_FSDP" in environment:
        words += ["--use_cpu", "false"]  # it would mean DDP; `ACCELERATE_TORCH_DEVICE` says where
    if "ACCELERATE_USE_DEEPSPEED" in environment:
        load_deepspeed()
    for rank in range(num_processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place = {key: str(value) for key, value in place.items()} if config is not None else {}
        logs.append(folder / f"log{num_processes}_{rank}.txt")
        processes.append(context.Process(target=rank_main, args=(script, words, environment | place, logs[-1])))
        processes[-1].start()
    for process in processes:
        process.join(timeout=300)
        if process.is_alive():
            process.terminate()
            process.join()
    output = logs[0].read_text()
    codes = [process.exitcode for process in processes]
    if any(codes):  # no `assert`: pytest would shorten what the processes said
        raise AssertionError(f"{codes} {output[-3000:]} {logs[-1].read_text()[-3000:]}")
    return output


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "log_history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


def largest_difference(one: Path, two: Path) -> float:
    """Of the losses of two runs."""
    return max(abs(a - b) for a, b in zip(losses(one), losses(two), strict=True))


def assert_close(first: Path, second: Path, tolerance: float = 1e-4) -> None:
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=tolerance, msg=lambda text, name=name: name + text)


def checkpoints(output_dir: Path) -> Path:
    """Where a run's Trainer kept its checkpoints."""
    (folder,) = output_dir.with_name(f"{output_dir.name}.trainer").iterdir()
    return folder


def without_step(output_dir: Path, step: int, to: Path) -> Path:
    """A copy of a run's checkpoints in which the one of a step is missing."""
    shutil.copytree(checkpoints(output_dir), to)
    shutil.rmtree(to / f"checkpoint-{step}")
    return to
