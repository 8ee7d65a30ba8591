"""The pieces that CONTRIBUTING.md shows do what it says."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import get_json_schema

from adamba.bases import BASES, Base
from adamba.budget import sizes
from adamba.data import load_card
from adamba.errors import UserError
from adamba.flops import num_parameters
from adamba.surgery import insert_mamba
from adamba.tasks import ENVIRONMENTS, TASKS, tool_schemas
from adamba.tools import TOOLS
from models import tokens

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def block(first_line: str) -> str:
    """The code block that begins with this comment, without it."""
    return re.findall(rf"```\w+\n# {re.escape(first_line)}\n(.*?)```", PAGE, re.DOTALL)[0]


def executed(first_line: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(block(first_line), names)
    return names


def test_task() -> None:
    task = executed("src/adamba/tasks/parity.py")["PARITY"]
    assert type(task) is type(TASKS["calculator"]) and tool_schemas(task.environment) == []
    instances = {split: {task.prompt(seed, split)["number"] for seed in range(50)} for split in ("train", "test")}
    assert not instances["train"] & instances["test"]
    for seed in range(10):
        row = task.prompt(seed, "train")
        assert row == task.prompt(seed, "train")
        environment = task.environment()
        environment.reset(**row)
        pair = task.preference(seed, "train")
        solved = task.example(seed, "train")["messages"]
        assert environment._outcome(solved[-1]["content"])["score"] == 1.0
        assert environment._outcome(pair["chosen"][0]["content"])["score"] == 1.0
        assert environment._outcome(pair["rejected"][0]["content"])["score"] == 0.0
        known = TASKS["calculator"]
        assert row.keys() >= known.prompt(seed, "train").keys() - {"expression", "answer"}
        assert pair.keys() == known.preference(seed, "train").keys()
        sample = ENVIRONMENTS["calculator"]()
        assert environment._outcome().keys() >= sample._outcome().keys()
    for make in (task.prompt, task.example, task.preference):
        assert make(3, "train", max_number=9)["prompt" if make is not task.example else "messages"]
        with pytest.raises(
            UserError, match="settings of task parity: unknown key 'digits'; known keys are max_number"
        ):
            make(3, "train", digits=3)
    assert all(task.prompt(seed, "train", max_number=9)["number"] < 9 for seed in range(20))


def test_card_of_a_task(tmp_path: Path) -> None:
    front_matter = block("data_cards/parity.md, between two lines of ---")
    (tmp_path / "parity.md").write_text(f"---\n{front_matter}---\nHow its rows are made.\n")
    card = load_card("parity", tmp_path)
    assert card.loader == "task" and card.license != "unknown" and card.use and card.size


def test_tool() -> None:
    reverse = executed("src/adamba/tools/reverse.py")["reverse"]
    assert reverse("abc") == "cba" and reverse("a" * 201).startswith("error")
    known = get_json_schema(TOOLS["calculator"])["function"]
    schema = get_json_schema(reverse)["function"]
    assert schema.keys() == known.keys() and schema["parameters"]["required"] == ["text"]


def test_dataset(tmp_path: Path) -> None:
    front_matter = block("data_cards/my_chats.md, between two lines of ---")
    (tmp_path / "my_chats.md").write_text(f"---\n{front_matter}---\nWhere it comes from.\n")
    card = load_card("my_chats", tmp_path)
    assert (card.path, card.loader, card.use) == ("me/my-chats", "hub", ("sft",))
    assert card.license == yaml.safe_load(front_matter)["license"]


def test_base(monkeypatch) -> None:
    entries = eval("{" + block("in BASES") + "}", {"Base": Base})
    for kind, base in entries.items():
        monkeypatch.setitem(BASES, kind, base)
    small = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = Qwen2Config(**small, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    dense = Qwen2ForCausalLM(config).eval()
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    ids = tokens(0)
    with torch.no_grad():
        hybrid = insert_mamba(dense).eval()
        torch.testing.assert_close(hybrid(ids).logits, dense(ids).logits, atol=1e-5, rtol=0)
    planned = sizes.inserted(sizes.config_from(dense.config.to_dict()), 1, None, {})  # `make plan` counts it too
    assert sum(num_parameters(planned).values()) == hybrid.num_parameters()


def test_every_path_that_the_pages_name_exists() -> None:
    invented = {
        "src/adamba/tasks/parity.py",
        "src/adamba/tools/reverse.py",
        "data_cards/parity.md",
        "data_cards/my_chats.md",
    }
    invented |= {"tests/tasks/test_parity.py", "recipes/tiny/phase7.yaml"}
    pages = {"CONTRIBUTING.md": PAGE, "AGENTS.md": (ROOT / "AGENTS.md").read_text(encoding="utf-8")}
    for page, text in pages.items():
        found = re.findall(r"\b(?:src|tests|recipes|data_cards|accelerate_configs|bench)/[\w/.*]*\w", text)
        missing = [path for path in found if path not in invented and not list(ROOT.glob(path.rstrip("_") + "*"))]
        assert not missing, json.dumps({page: missing})
