"""`run_sft.py` on a tiny hybrid: packed and not, with LoRA, resumed, and with bad input."""

import json
import shutil

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import run_sft
from adamba.data import train_tokenizer
from adamba.model import AdambaForCausalLM
from adamba.training.sft import RowCollator
from models import smallest_config

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(
        ['Calculate 5 + 3? calculator {"expression": "1"} play {"cell": 3} # Answer:'] * 9, 400
    )
    config = smallest_config(len(tokenizer), first_exit_layer=0)
    AdambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(base, tmp_path):
    def write(**changes):
        values = {
            "model_name_or_path": str(base),
            "mix": {"calculator": 1.0, "tic_tac_toe": 0.5},
            "max_length": 192,
            "packing": True,
            "assistant_only_loss": True,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.01,
            "num_eval_rows": 3,
            "logging_steps": 2,
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "output_dir": str(tmp_path / "out"),
        }
        path = tmp_path / "recipe.yaml"
        path.write_text("# accelerate launch src/run_sft.py recipe.yaml\n" + yaml.safe_dump(values | changes))
        return path

    return write


def run(monkeypatch, recipe, *options):
    monkeypatch.setattr("sys.argv", ["src/run_sft.py", str(recipe), *options])
    run_sft.main()


def test_packed_sft_learns_and_logs_each_source(monkeypatch, recipe, tmp_path):
    run(monkeypatch, recipe())
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["tokens_seen"] == 6 * 2 * 192
    assert metrics["eval_loss"] == pytest.approx(
        (2 * metrics["eval_loss_calculator"] + metrics["eval_loss_tic_tac_toe"]) / 3
    )
    history = json.loads((tmp_path / "out/log_history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert {"loss_calculator", "loss_tic_tac_toe"} <= {key for entry in history for key in entry}
    assert {"eval_loss_calculator", "eval_loss_tic_tac_toe"} <= {key for entry in history for key in entry}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.response_template and tokenizer.chat_template
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_rows_can_stand_alone(monkeypatch, recipe, tmp_path):
    lengths = []
    collate = RowCollator.__call__

    def watched(self, rows):
        if len(lengths) < 4:  # the rows of training come before those of the evaluation
            lengths.extend(len(row["input_ids"]) for row in rows)
        return collate(self, rows)

    monkeypatch.setattr(RowCollator, "__call__", watched)
    run(monkeypatch, recipe(packing=False, max_steps=2))
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["train_loss"] > 0
    assert metrics["tokens_seen"] == sum(lengths) < 4 * 192


def test_rows_are_padded_without_a_padding_token(monkeypatch, recipe, base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    run(monkeypatch, recipe(model_name_or_path=str(folder), packing=False, max_steps=1))
    assert json.loads((tmp_path / "out/metrics.json").read_text())["train_loss"] > 0


def test_the_held_out_loss_is_of_the_mean_token_whatever_the_batch_size(monkeypatch, recipe):
    evaluate, losses = run_sft.evaluate_sources, []

    def at_each_size(trainer, mix):
        for size in (1, 2, 5):
            trainer.args.per_device_eval_batch_size = size
            losses.append(evaluate(trainer, mix))
        totals = torch.zeros(2, dtype=torch.float64)
        for row in trainer.eval_dataset["tic_tac_toe"]:
            batch = trainer.data_collator([row])
            with torch.no_grad():
                logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            total = cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum")
            totals += torch.tensor([total, (batch["labels"][0, 1:] != -100).sum()])
        losses.append(losses[0] | {"eval_loss_tic_tac_toe": (totals[0] / totals[1]).item()})
        return losses[0]

    monkeypatch.setattr(run_sft, "evaluate_sources", at_each_size)
    run(monkeypatch, recipe(packing=False, max_steps=1))
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)


def test_lora_is_merged_into_a_whole_checkpoint(monkeypatch, recipe, base, tmp_path):
    run(monkeypatch, recipe(use_peft=True, lora_r=4, max_steps=2))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert trained.keys() == before.keys()
    changed = {name for name in trained if not trained[name].equal(before[name])}
    assert changed and all(name.split(".")[-2].endswith("_proj") for name in changed)
    assert not [name for name in changed if "gate" in name.split(".")[2] or "router" in name]


def test_gates_and_router_learn_beside_adapters_and_resume(monkeypatch, recipe, base, tmp_path):
    changes = {"use_peft": True, "lora_r": 4, "elastic": True, "distill": True, "max_steps": 3}
    path = recipe(**changes, save_strategy="steps", save_steps=2)
    run(monkeypatch, path)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert trained.keys() == before.keys()
    changed = {name for name in trained if not trained[name].equal(before[name])}
    whole = {name for name in trained if ("exit_gates" in name or "router" in name) and "temperature" not in name}
    assert any("exit_gates" in name for name in whole) and whole <= changed, whole - changed
    assert all(name.split(".")[-2].endswith("_proj") for name in changed)

    (last,) = (tmp_path / "out.trainer").glob("*/checkpoint-3")
    for folder in (last, tmp_path / "out"):
        shutil.rmtree(folder)
    run(monkeypatch, path)
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(resumed[name].equal(tensor) for name, tensor in trained.items())


def test_the_router_trains_alone_and_its_confidence_is_saved(monkeypatch, recipe, base, tmp_path):
    changes = {"train_router": True, "router_budget": 0.9, "packing": False, "max_steps": 8, "learning_rate": 0.05}
    run(monkeypatch, recipe(**changes))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = {name for name, tensor in trained.state_dict().items() if not tensor.equal(before[name])}
    assert changed and all(name.startswith("model.router.") for name in changed)
    assert trained.model.router.down_proj.is_trained
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert trained.generation_config.router_confidence == metrics["router_confidence"]
    assert metrics["router_cost"] <= metrics["router_budget"] == 0.9
    history = json.loads((tmp_path / "out/log_history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_elastic_adapters_are_refused_under_fsdp(monkeypatch, recipe, capsys):
    monkeypatch.setattr(run_sft, "is_true", lambda name: name == "ACCELERATE_USE_FSDP")
    with pytest.raises(SystemExit):
        run(monkeypatch, recipe(elastic=True, use_peft=True))
    assert "error: elastic: with use_peft it does not run under FSDP" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_router": True}, "train_router: needs packing: false"),
        ({"elastic": True, "use_peft": True, "use_dora": True}, "use_dora: DoRA and the like"),
        ({"train_router": True, "use_peft": True, "packing": False}, "train_router: trains the router alone"),
        ({"train_router": True, "router_budget": 0.0}, "router_budget: 0.0 must be above 0"),
        ({"mix": {"calculater": 1.0}}, "did you mean 'calculator'"),
        ({"mix": {"calculator": -1.0}}, "weight of 'calculator' is -1"),
        ({"max_length": 12, "packing": False}, "max_length: 12 cuts off everything"),
        ({"max_steps": -1}, "max_steps: -1 must be given"),
        ({"packing_strategy": "wrapped"}, "packing_strategy: 'wrapped' is not supported"),
        ({"lora_r": 0}, "lora_r: 0 must be"),
        ({"loss_type": "dft"}, "loss_type: 'dft' would change nothing here; leave it out"),
        ({"completion_only_loss": True}, "completion_only_loss: True would change nothing here; leave it out"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(monkeypatch, recipe, tmp_path, capsys, changes, message):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, recipe(**changes))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()
