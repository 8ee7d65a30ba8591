"""`run_surgery.py` beyond a single process and fp32: halves are compared in fp32, of several processes one works."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_runs import DATA, runner, save_hybrid, tensors, write_recipe

pytestmark = pytest.mark.smoke
SURGERY = DATA | {"num_check_rows": 2, "mix": {"calculator": 1.0}, "model_name_or_path": "hybrid", "output_dir": "out"}
EXPAND = {"operation": "expand", "hidden_size": 64}


def test_a_hybrid_in_halves_is_sorted_and_keeps_its_generation_config(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_hybrid(tmp_path / "hybrid").to(torch.bfloat16)
    model.generation_config.exit_threshold = 0.75
    model.save_pretrained(tmp_path / "hybrid")
    path = write_recipe(tmp_path / "x.yaml", SURGERY | {"operation": "sort", "dtype": "bfloat16"})
    runner(monkeypatch)("run_surgery.py", path)
    before, after = tensors(tmp_path / "hybrid"), tensors(tmp_path / "out")
    assert any(not before[name].equal(after[name]) for name in before)
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/metrics.json").read_text())["max_abs_logit_diff"] <= 1e-4
    assert AutoModelForCausalLM.from_pretrained("out").generation_config.exit_threshold == 0.75


@pytest.mark.parametrize("streaming", [False, True])
def test_of_several_processes_the_first_works_alone(streaming: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_hybrid(tmp_path / "hybrid")
    path = write_recipe(tmp_path / "x.yaml", SURGERY | EXPAND | {"streaming": streaming})
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        runner(monkeypatch)("run_surgery.py", path)
        assert (tmp_path / "out").exists() == (rank == "0")
    assert model.config.tie_word_embeddings, "which are counted once"
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["num_parameters"] == AutoModelForCausalLM.from_pretrained("out").num_parameters()
