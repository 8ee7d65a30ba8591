"""
ZeRO-1, 2 and 3, ZeRO-3 with offload, and FSDP2 in two processes (gloo), by the files of `accelerate_configs/`: the
losses of one process, the same plain checkpoint at the end, and a resume to the same bits.

These files are for GPUs; `processes.environment_on_cpu` says what is different here: two processes, fp32, gloo.
"""

import json
from pathlib import Path

import pytest
import torch

from adamba.model import AdambaForCausalLM
from adamba.training.sharding import saved_by
from processes import STEPS, assert_close, checkpoints, largest_difference, launch, without_step, write_elastic_recipe

SAVED_BY = {
    "zero1": ("DeepSpeed ZeRO-1 or 2", 2),
    "zero2": ("DeepSpeed ZeRO-1 or 2", 2),
    "zero3": ("DeepSpeed ZeRO-3", 2),
    "zero3_offload": ("DeepSpeed ZeRO-3", 2),
    "fsdp2": ("FSDP", None),
}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe and, in the folder `one`, what a single process makes of it."""
    folder = tmp_path_factory.mktemp("sharding")
    write_elastic_recipe(folder)
    launch(1, folder, folder / "recipe.yaml", "--output_dir", folder / "one")
    return folder


@pytest.mark.parametrize("config", SAVED_BY)
def test_sharded_training_is_training(one: Path, config: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    out = tmp_path / "out"
    launch(2, tmp_path, one / "recipe.yaml", "--output_dir", out, config=config)
    assert saved_by(checkpoints(out) / f"checkpoint-{STEPS}") == SAVED_BY[config], "the state was not sharded"
    assert largest_difference(one / "one", out) <= 1e-5
    assert_plain(out, one / "one")

    kept = without_step(out, STEPS, tmp_path / "kept")
    resume = ("--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", kept)
    output = launch(2, tmp_path, one / "recipe.yaml", *resume, config=config)
    assert f"resuming from {kept}/checkpoint-{STEPS // 2}" in output
    assert_close(out, tmp_path / "resumed", tolerance=0.0)
    assert not (tmp_path / "compiled").exists(), "a test needs no compiler"


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
