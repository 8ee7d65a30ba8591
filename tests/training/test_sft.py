"""What `run_sft.py` evaluates on."""

import json

import pytest

from adamba.data import train_tokenizer
from adamba.data.arguments import DataArguments
from adamba.errors import UserError
from adamba.training.sft import MixSFTConfig, eval_datasets


def chats(path, number):
    rows = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(number)]
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    path.with_suffix(".md").write_text(
        f"---\nadamba: {{id: {path.stem}, loader: files, format: messages}}\n---\nMine."
    )
    return {path.stem: str(path)}


def test_each_of_several_local_files_is_evaluated_beside_a_task(tmp_path):
    files = chats(tmp_path / "mine.jsonl", 300) | chats(tmp_path / "yours.jsonl", 300)
    card = "---\nadamba: {id: calculator, loader: task, format: messages}\n---\nA task."
    (tmp_path / "calculator.md").write_text(card)
    mix = {**dict.fromkeys(files, 1.0), "calculator": 1.0}
    config = MixSFTConfig(
        output_dir=str(tmp_path), max_steps=1, max_length=64, num_eval_rows=2, use_cpu=True, bf16=False
    )
    tokenizer = train_tokenizer(["1 2 3? 4!"], 400)
    data_args = DataArguments(mix=mix, data_files=files, cards_dir=str(tmp_path))
    datasets = eval_datasets(data_args, tokenizer, config)
    assert {name: set(rows["source"]) for name, rows in datasets.items()} == {name: {name} for name in mix}

    data_args.data_files["other"] = "not/in/the/mix"
    with pytest.raises(UserError, match="data_files: 'other' is not in the mix"):
        eval_datasets(data_args, tokenizer, config)
