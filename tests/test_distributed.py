"""
Two processes (gloo) against one: the same losses, checkpoints that either goes on from, a plain checkpoint at the end.

Processes are forked from this one, whose imports are done; `smoke/test_two_processes.py` takes the launcher's way.
"""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path

import pytest
import torch

from adamba.model import AdambaForCausalLM
from adamba.training.pretraining import PretrainTrainer
from tiny_runs import ROOT, TRAIN, save_hybrid, tensors, write_recipe

STEPS = 20
RECIPE = TRAIN | {
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": STEPS // 2,
    "elastic": True,
    "learning_rate": 1.0e-3,
}
RECIPE.pop("per_device_train_batch_size")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_main(script: str, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """What one process of a launch does."""
    from importlib import import_module

    from accelerate.state import AcceleratorState, GradientState, PartialState

    with log.open("w") as file:
        sys.stdout = sys.stderr = file  # and pytest's own handlers go
        logging.basicConfig(stream=file, format="%(message)s", force=True)
        os.environ.update(environment)
        torch.set_num_threads(1)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        sys.argv = [str(ROOT / "src" / script), *arguments]
        try:
            import_module(script.removesuffix(".py")).main()
        except Exception:
            traceback.print_exc()
            raise
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def launch(num_processes: int, folder: Path, *arguments: str | Path, rows: int = 4, **environment: str) -> str:
    """Run `run_pretrain.py` in so many processes; returns the first one's output. Each step sees `rows` rows."""
    context, port, processes, logs = multiprocessing.get_context("fork"), free_port(), [], []
    words = [*map(str, arguments), "--per_device_train_batch_size", str(rows // num_processes)]
    for rank in range(num_processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        place = {key: str(value) for key, value in place.items()} if num_processes > 1 else {}
        logs.append(folder / f"log{num_processes}_{rank}.txt")
        options = ("run_pretrain.py", words, place | environment, logs[-1])
        processes.append(context.Process(target=rank_main, args=options))
        processes[-1].start()
    for process in processes:
        process.join(timeout=900)
    output = logs[0].read_text()
    codes = [process.exitcode for process in processes]
    if any(codes):  # no `assert`: pytest would shorten what the processes said
        raise AssertionError(f"{codes} {output[-3000:]} {logs[-1].read_text()[-3000:]}")
    return output


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "log_history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


def assert_close(first: Path, second: Path, tolerance: float = 1e-4) -> None:
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=tolerance, msg=lambda text, name=name: name + text)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two`: the same recipe on one process and on two; elastic, so widths and exits are drawn."""
    folder = tmp_path_factory.mktemp("distributed")
    save_hybrid(folder / "model")
    write_recipe(folder / "recipe.yaml", RECIPE | {"model_name_or_path": str(folder / "model")})
    launch(1, folder, folder / "recipe.yaml", "--output_dir", folder / "one")
    launch(2, folder, folder / "recipe.yaml", "--output_dir", folder / "two")
    return folder


def checkpoints(output_dir: Path) -> Path:
    (folder,) = output_dir.with_name(f"{output_dir.name}.trainer").iterdir()
    return folder


def test_two_processes_have_the_losses_of_one(ran: Path) -> None:
    one, two = losses(ran / "one"), losses(ran / "two")
    assert len(one) == len(two) == STEPS and one[-1] < one[0]
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-5
    assert (checkpoints(ran / "two") / f"checkpoint-{STEPS}/rng_state_1.pth").is_file(), "there was a second process"
    assert_close(ran / "one", ran / "two")
    model = AdambaForCausalLM.from_pretrained(ran / "two")
    assert model.num_parameters() == json.loads((ran / "two/metrics.json").read_text())["num_parameters"]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_of_two_processes_goes_on_in_one_or_two(ran: Path, num_processes: int, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(checkpoints(ran / "two"), kept)
    shutil.rmtree(kept / f"checkpoint-{STEPS}")
    where = ("--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", kept)
    output = launch(num_processes, tmp_path, ran / "recipe.yaml", *where)
    assert f"resuming from {kept}/checkpoint-{STEPS // 2}" in output
    if num_processes == 2:
        expected, found = tensors(ran / "two"), tensors(tmp_path / "resumed")
        assert all(torch.equal(expected[name], found[name]) for name in expected), "the same bits"
    else:
        assert_close(ran / "two", tmp_path / "resumed")


def test_a_signal_to_one_process_stops_both_after_the_same_step(ran: Path, tmp_path: Path, monkeypatch) -> None:
    step = PretrainTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3 and self.args.process_index == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", interrupted)  # the forks inherit it
    with pytest.raises(AssertionError, match=r"\[143, 143\]"):
        launch(2, tmp_path, ran / "recipe.yaml", "--output_dir", tmp_path / "out")
    assert (checkpoints(tmp_path / "out") / "checkpoint-4/complete.json").is_file()


def test_another_number_of_rows_per_step_is_refused(ran: Path, tmp_path: Path) -> None:
    shutil.copytree(ran / "two.trainer", tmp_path / "out.trainer")
    with pytest.raises(AssertionError, match="rows_per_step: 4 there, 2 here"):
        # the same recipe, which says 2 rows for each process, now on one
        launch(1, tmp_path, ran / "recipe.yaml", "--output_dir", tmp_path / "out", rows=2)


# The same under DeepSpeed, whose optimizer (and at stage 3 parameters) are split between the processes.
ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_CPU": "false",  # with "true" accelerate would quietly run DDP; the recipe's use_cpu is what counts
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_has_the_losses_of_one_process_and_resumes(ran: Path, stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    environment = ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    launch(2, tmp_path, ran / "recipe.yaml", "--output_dir", tmp_path / "out", **environment)
    assert list(checkpoints(tmp_path / "out").glob(f"checkpoint-{STEPS}/global_step*/*optim_states.pt")), "plain DDP"
    assert max(abs(a - b) for a, b in zip(losses(ran / "one"), losses(tmp_path / "out"), strict=True)) <= 1e-5
    assert_close(ran / "one", tmp_path / "out")
    kept = tmp_path / "kept"
    shutil.copytree(checkpoints(tmp_path / "out"), kept)
    shutil.rmtree(kept / f"checkpoint-{STEPS}")
    where = ("--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", kept)
    launch(2, tmp_path, ran / "recipe.yaml", *where, **environment)
    assert_close(tmp_path / "out", tmp_path / "resumed", tolerance=0.0)
