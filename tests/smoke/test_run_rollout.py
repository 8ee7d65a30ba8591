"""`run_rollout.py` on a tiny random model: it plays, labels, writes, and refuses bad input."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import run_rollout
from adamba.data import train_tokenizer

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(['Calculate 5 + 3? calculator {"expression": "1"} play {"cell": 3}'] * 9, 400)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(monkeypatch, checkpoint, folder, *options):
    arguments = ["--model_name_or_path", checkpoint, "--output_dir", folder, "--max_new_tokens", 8, *options]
    monkeypatch.setattr("sys.argv", ["src/run_rollout.py", *map(str, arguments)])
    run_rollout.main()


def test_trajectories_are_written_with_labels(monkeypatch, checkpoint, tmp_path):
    mix = ("--mix", "calculator=1.0,tic_tac_toe=1.0", "--num_prompts", 5, "--num_samples", 2)
    run(monkeypatch, checkpoint, tmp_path / "a", *mix)
    lines = (tmp_path / "a/trajectories.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 10 and len({(row["environment"], row["seed"]) for row in rows}) == 5
    for row in rows:
        assert row["messages"][row["num_prompt_messages"]]["role"] == "assistant"
        assert not row["success"] and row["tools"] and "score" in row["outcome"]
    metrics = json.loads((tmp_path / "a/metrics.json").read_text())
    assert metrics["num_trajectories"] == 10 and metrics["num_pairs"] == 0
    run(monkeypatch, checkpoint, tmp_path / "b", *mix)
    assert (tmp_path / "b/trajectories.jsonl").read_text().splitlines() == lines


def test_episodes_are_played_on_the_gpu_where_there_is_one(monkeypatch, checkpoint, tmp_path):
    def moved(self, device):
        raise RuntimeError(f"moved to {device}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(LlamaForCausalLM, "to", moved)
    with pytest.raises(RuntimeError, match="moved to cuda"):
        run(monkeypatch, checkpoint, tmp_path / "a", "--mix", "calculator=1.0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mix", "pydoc_topics=1.0"), "'pydoc_topics' is no task"),
        (("--mix", "calculator=1.0", "--num_samples", 0), "num_samples: 0 must be at least 1"),
        (("--mix", "calculator=1.0", "--split", "dev"), "split"),
        ((), "mix: missing"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, checkpoint, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, checkpoint, tmp_path / "out", *options)
    assert exit.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
