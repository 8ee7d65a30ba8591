"""
ZeRO-1, 2 and 3, ZeRO-3 with offload, and FSDP2 in two processes (gloo), by the files of `accelerate_configs/`: the
losses of one process, the same plain checkpoint at the end, and a resume to the same bits.

These files are for GPUs; `processes.environment_on_cpu` says what is different here: two processes, fp32, gloo.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.training import head_losses, pretraining
from adamba.training.optimizers import OptimizerMixin
from adamba.training.pretraining import PretrainConfig
from adamba.training.sharding import readable_checkpoint, saved_by
from processes import STEPS, assert_close, checkpoints, largest_difference, launch, without_step, write_elastic_recipe

SAVED_BY = {
    "zero1": ("DeepSpeed ZeRO-1 or 2", 2),
    "zero2": ("DeepSpeed ZeRO-1 or 2", 2),
    "zero3": ("DeepSpeed ZeRO-3", 2),
    "zero3_offload": ("DeepSpeed ZeRO-3", 2),
    "fsdp2": ("FSDP", None),
}


# Each form of checkpoint once: ZeRO-1 and 2 share theirs, and so do ZeRO-3 with and without offload.
ON_ONE_TOO = ("zero2", "zero3", "fsdp2")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe and, in the folder `one`, what a single process makes of it."""
    folder = tmp_path_factory.mktemp("sharding")
    write_elastic_recipe(folder)
    launch(1, folder, folder / "recipe.yaml", "--output_dir", folder / "one")
    return folder


@pytest.mark.parametrize("config", SAVED_BY)
def test_sharded_training_is_training(one: Path, config: str, tmp_path: Path, monkeypatch) -> None:
    if config.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    out = tmp_path / "out"
    launch(2, tmp_path, one / "recipe.yaml", "--output_dir", out, config=config)
    assert saved_by(checkpoints(out) / f"checkpoint-{STEPS}") == SAVED_BY[config], "the state was not sharded"
    assert largest_difference(one / "one", out) <= 1e-5
    assert_plain(out, one / "one")

    kept = without_step(out, STEPS, tmp_path / "kept")
    for num_processes in (2, 1) if config in ON_ONE_TOO else (2,):
        resumed = tmp_path / f"on_{num_processes}"
        resume = ("--output_dir", resumed, "--resume_from_checkpoint", kept)
        output = launch(num_processes, tmp_path, one / "recipe.yaml", *resume, config=config)
        assert f"resuming from {kept}/checkpoint-{STEPS // 2}" in output
        assert_close(out, resumed, tolerance=0.0 if num_processes == 2 else 1e-4)
        assert [path.name for path in checkpoints(resumed).iterdir() if path.is_dir()] == [f"checkpoint-{STEPS}"]
    assert not (tmp_path / "compiled").exists(), "a test needs no compiler"


def test_zero3_runs_the_head_as_often_on_every_rank(one: Path, tmp_path: Path, monkeypatch) -> None:
    """In chunks of two labels; ranks pack different documents, so other numbers of labels. It waited forever."""
    engine = pytest.importorskip("deepspeed.runtime.engine", reason="DeepSpeed is for Linux").DeepSpeedEngine
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    monkeypatch.setattr(engine, "zero_param_persistence_threshold", lambda self: 0)  # small weights are split too
    vocabulary = json.loads((one / "model" / "config.json").read_text())["vocab_size"]
    monkeypatch.setitem(head_losses.LOGITS_AT_ONCE, "cpu", 2 * vocabulary)
    for num_processes, config in ((1, None), (2, "zero3")):
        out = ("--output_dir", tmp_path / str(num_processes), "--max_steps", "3", "--save_strategy", "no")
        launch(num_processes, tmp_path, one / "recipe.yaml", *out, config=config)
    assert largest_difference(tmp_path / "1", tmp_path / "2") <= 1e-5


@pytest.mark.parametrize("config", ["ddp_cpu", "zero2", "fsdp2"])
def test_compiled_layers_are_shared_out_too(one: Path, config: str, tmp_path: Path, monkeypatch) -> None:
    if config.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is for Linux")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    out = tmp_path / "out"
    options = "--torch_compile true --torch_compile_backend aot_eager --activation_checkpointing true".split()
    output = launch(2, tmp_path, one / "recipe.yaml", "--output_dir", out, *options, config=config)
    assert "torch_compile: each layer is compiled when it first runs" in output
    assert largest_difference(one / "one", out) <= 1e-5
    assert_plain(out, one / "one")


def assert_plain(sharded: Path, plain: Path) -> None:
    """The published folders hold the same files, and weights that differ by rounding only."""
    assert {path.name for path in sharded.iterdir()} == {path.name for path in plain.iterdir()}
    assert (sharded / "config.json").read_text() == (plain / "config.json").read_text()
    assert_close(plain, sharded)
    counts = [json.loads((folder / "metrics.json").read_text()) for folder in (plain, sharded)]
    for key in ("num_parameters", "num_trainable_parameters", "tokens_seen"):
        assert counts[0][key] == counts[1][key], key
    ids = torch.arange(1, 9)[None]
    first, second = (AdambaForCausalLM.from_pretrained(folder).eval()(ids).logits for folder in (plain, sharded))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-3)


def sharded_trainer(world_size: int, stage: int | None = None, fsdp: bool = False) -> SimpleNamespace:
    plugin = SimpleNamespace(zero_stage=stage)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    sharding = {"is_deepspeed_enabled": stage is not None, "is_fsdp_enabled": fsdp}
    return SimpleNamespace(**sharding, accelerator=accelerator, args=SimpleNamespace(world_size=world_size))


@pytest.mark.parametrize(
    ("files", "trainer", "message"),
    [
        (["mp_rank_00_model_states.pt"], sharded_trainer(1), "saved under DeepSpeed ZeRO-1 or 2, this launch has no "),
        (["mp_rank_00_model_states.pt"], sharded_trainer(2, stage=3), "ZeRO-1 or 2, this launch has DeepSpeed ZeRO-3"),
        ([], sharded_trainer(2, fsdp=True), "saved under DeepSpeed ZeRO-3, this launch has FSDP"),
    ],
)
def test_a_checkpoint_of_another_sharding_is_one_line(files, trainer, message, tmp_path: Path) -> None:
    shards = tmp_path / "checkpoint-10/global_step10"
    shards.mkdir(parents=True)
    for name in (*files, "zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        (shards / name).touch()
    with pytest.raises(UserError, match=message) as error, readable_checkpoint(trainer, str(shards.parent)):
        pass
    assert f"--model_name_or_path {shards.parent}" in str(error.value) and "\n" not in str(error.value)


def test_an_unsharded_checkpoint_is_read_as_it_is_and_only_unsharded(tmp_path: Path) -> None:
    with readable_checkpoint(sharded_trainer(1), str(tmp_path)) as checkpoint:
        assert checkpoint == str(tmp_path)
    with pytest.raises(UserError, match="saved under no sharding, this launch has DeepSpeed ZeRO-1 or 2"):
        with readable_checkpoint(sharded_trainer(2, stage=2), str(tmp_path)):
            pass


def test_whole_matrices_are_asked_for() -> None:
    trainer = SimpleNamespace(args=SimpleNamespace(use_muon=True), is_deepspeed_enabled=False, is_fsdp_enabled=True)
    with pytest.raises(UserError, match="use_muon: needs whole matrices on each rank"):
        OptimizerMixin.create_optimizer(trainer)


def test_sorting_is_refused_where_weights_are_elsewhere(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pretraining, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match="sort_by_importance: true needs whole weights"):
        PretrainConfig(output_dir=str(tmp_path), max_steps=1, sort_by_importance=True, use_cpu=True)
