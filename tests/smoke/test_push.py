"""`push_to_hub: true` in the real scripts, against a Hub on this machine: branches, cards, and loading back in a
process that has no `adamba`."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from adamba import hub as pushing
from adamba.loading import load_checkpoint
from hub_server import TOKEN, answers, running_hub
from tiny_runs import DATA, LEVELS, ROOT, TRAIN, runner, save_base, save_hybrid, write_recipe

pytestmark = pytest.mark.smoke
HUB = {"push_to_hub": True, "hub_model_id": "me/tiny"}
LOAD_BACK = """
import sys
sys.modules["adamba"] = None  # whatever is installed here, this process has no such package
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("me/tiny", revision=sys.argv[1], trust_remote_code=True).eval()
AutoTokenizer.from_pretrained("me/tiny", revision=sys.argv[1], trust_remote_code=True)  # else it asks, and waits
ids = torch.arange(3, 23)[None]
with torch.no_grad():
    save_file({"full": model(ids).logits, "ghost": model(ids, width="ghost").logits}, sys.argv[2])
"""


@pytest.fixture
def hub(monkeypatch):
    with running_hub() as running:
        for name, value in (("ENDPOINT", running.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(pushing.time, "sleep", lambda seconds: None)
        huggingface_hub.close_session()
        yield running
    huggingface_hub.close_session()


def test_phases_become_branches_that_load_without_this_package(hub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    save_base(tmp_path / "dense")
    run = runner(monkeypatch)
    surgery = DATA | HUB | {"operation": "insert", "model_name_or_path": str(tmp_path / "dense"), "num_check_rows": 2}
    hybrid = {"mamba_state_size": 4, "mamba_head_dim": 8, "mamba_num_groups": 4, "first_exit_layer": 1}
    surgery |= {"width_levels": LEVELS, "hybrid_config": hybrid, "output_dir": str(tmp_path / "phase0")}
    run("run_surgery.py", write_recipe(tmp_path / "phase0.yaml", surgery))
    training = TRAIN | HUB | {"model_name_or_path": str(tmp_path / "phase0"), "logging_steps": 1, "elastic": True}
    hub.fail("/commit/", answers(503))
    out = tmp_path / "phase2"
    run("run_pretrain.py", write_recipe(tmp_path / "phase2.yaml", training | {"output_dir": str(out)}))
    evaluation = DATA | HUB | {"model_name_or_path": str(out), "num_rows": 2}
    run("run_eval.py", write_recipe(tmp_path / "eval.yaml", evaluation))

    repository = hub.repositories["me/tiny"]
    assert repository.private and set(repository.branches) == {"main", "phase0", "phase2"}
    pushed = repository.branches["phase2"]
    assert pushed["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert {"images/training.png", "images/widths.png", "modeling_adamba.py", "metrics.json"} <= pushed.keys()
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in pushed)
    card = ModelCard(pushed["README.md"].decode())
    assert card.data.adamba["recipe"]["max_steps"] == 4 and card.data.adamba["recipe"]["elastic"] is True
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["eval_loss"].metric_value > 0 and results["eval_loss_calculator"].dataset_name == (
        "Calculator expressions"
    )
    assert card.text.count('from_pretrained("me/tiny", revision="phase2", trust_remote_code=True)') == 2
    assert "![training](images/training.png)" in card.text and "| held-out loss |" in card.text
    assert "Calculator expressions (`calculator`) | 66.7% | apache-2.0" in card.text
    assert yaml.safe_load(pushed["recipe.yaml"])["hub_model_id"] == "me/tiny"

    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment |= {"TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", LOAD_BACK, "phase2", str(tmp_path / "logits.safetensors")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = load_file(tmp_path / "logits.safetensors")
    model = load_checkpoint(str(out)).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        for name, width in (("full", None), ("ghost", "ghost")):
            assert torch.equal(loaded[name], model(ids, width=width).logits), name


def test_no_permission_stops_before_the_model_is_loaded(hub, tmp_path: Path, monkeypatch, capsys) -> None:
    save_hybrid(tmp_path / "hybrid")
    keys = {"model_name_or_path": str(tmp_path / "hybrid"), "output_dir": str(tmp_path / "out")}
    recipe = write_recipe(tmp_path / "x.yaml", TRAIN | HUB | keys | {"hub_model_id": "others/tiny"})
    monkeypatch.setattr("run_pretrain.load_model_and_tokenizer", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(SystemExit, match="2"):
        runner(monkeypatch)("run_pretrain.py", recipe)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "hub_model_id: others/tiny: no permission to write there (HTTP 403)" in line


def test_a_hub_that_breaks_after_training_costs_no_weights(hub, tmp_path: Path, monkeypatch, capsys) -> None:
    save_hybrid(tmp_path / "hybrid")
    out = tmp_path / "phase1"
    keys = {"model_name_or_path": str(tmp_path / "hybrid"), "output_dir": str(out), "max_steps": 1}
    hub.fail("preupload", answers(500), times=10**6)
    with pytest.raises(SystemExit, match="2"):
        runner(monkeypatch)("run_pretrain.py", write_recipe(tmp_path / "x.yaml", TRAIN | HUB | keys))
    assert f"`hf upload me/tiny {out} --revision phase1`" in capsys.readouterr().err.splitlines()[-1]
    assert load_checkpoint(str(out)).num_parameters() > 0
