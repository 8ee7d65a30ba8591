"""Rows for GRPO and DPO: drawn by weight, repeatable, and trajectories read with errors that name the line."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from adamba.data.tokenizer import CHAT_TEMPLATE
from adamba.tasks import TASKS
from adamba.training.agent_rows import preference_rows, prompt_rows, read_pairs

MIX = {"calculator": 3.0, "tic_tac_toe": 1.0}
USER = [{"role": "user", "content": "5 + 3 = ?"}]
GOOD, BAD = [{"role": "assistant", "content": "8"}], [{"role": "assistant", "content": "9"}]
PAIR = {"prompt": USER, "chosen": GOOD, "rejected": BAD}


def test_prompts_are_drawn_by_weight_and_repeatable() -> None:
    rows = prompt_rows(MIX, 400, split="train", seed=1, settings={"tic_tac_toe": {"opponent": "perfect"}})
    count = Counter(rows["environment"])
    assert 270 < count["calculator"] < 330 and count.total() == 400
    assert {row["opponent"] for row in rows} == {None, "perfect"}
    again = prompt_rows(MIX, 400, split="train", seed=1, settings={"tic_tac_toe": {"opponent": "perfect"}})
    assert rows.to_list() == again.to_list()
    assert rows.to_list() != prompt_rows(MIX, 400, split="train", seed=2, settings={}).to_list()
    for row in rows.select(range(20)):  # a row resets its environment, other tasks' columns notwithstanding
        environment = TASKS[row["environment"]].environment()
        assert environment.reset(**{key: value for key, value in row.items() if key != "environment"}) is None


def test_unknown_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="mix: 'chess' is unknown; use calculator, tic_tac_toe"):
        prompt_rows({"chess": 1.0}, 1, split="train", seed=0, settings={})
    with pytest.raises(ValueError, match="task_settings: 'chess'"):
        prompt_rows(MIX, 1, split="train", seed=0, settings={"chess": {}})
    for name in ("sharegpt", "chess"):
        with pytest.raises(ValueError, match=rf"mix: '{name}' is no task .*; give its pairs: --data_files {name}="):
            preference_rows({name: 1.0}, 1, split="train", seed=0, settings={}, data_files={})
    with pytest.raises(ValueError, match="rollouts: it lives in no repository .*; pass local files with --data_fil"):
        preference_rows({"rollouts": 1.0}, 1, split="train", seed=0, settings={}, data_files={})


def test_trajectories_repeat_and_mix_with_tasks(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n\n" + json.dumps(PAIR | {"chosen": BAD, "rejected": GOOD}))
    rows = preference_rows(
        {"pairs": 1.0, "tic_tac_toe": 1.0},
        60,
        split="train",
        seed=0,
        settings={},
        data_files={"pairs": str(path)},
    )
    assert set(rows["source"]) == {"pairs", "tic_tac_toe"}
    answers = Counter(row["chosen"][0]["content"] for row in rows if row["source"] == "pairs")
    assert set(answers) == {"8", "9"}
    assert all(row["tools"] == [] for row in rows if row["source"] == "pairs")


def test_pairs_of_a_file_are_split_by_prompt_and_each_drawn_once_before_any_again(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    pairs = [PAIR | {"prompt": [{"role": "user", "content": f"question {number // 2}"}]} for number in range(1000)]
    pairs = [pair | {"chosen": [{"role": "assistant", "content": f"answer {n}"}]} for n, pair in enumerate(pairs)]
    path.write_text("\n".join(map(json.dumps, pairs)))

    def drawn(number: int, split: Any, seed: int = 0) -> list[tuple[str, str]]:
        options: dict[str, Any] = {"split": split, "seed": seed, "settings": {}, "data_files": {"pairs": str(path)}}
        rows = preference_rows({"pairs": 1.0}, number, **options)
        return [(row["prompt"][0]["content"], row["chosen"][0]["content"]) for row in rows]

    held_out, trained = set(drawn(1000, "test")), set(drawn(1000, "train"))
    assert 5 < len(held_out) < 50 and len(held_out) + len(trained) == 1000
    assert not {prompt for prompt, _ in held_out} & {prompt for prompt, _ in trained}
    twice = drawn(2 * len(trained), "train")
    first, second = twice[: len(trained)], twice[len(trained) :]
    assert set(first) == set(second) == trained and first != second
    assert drawn(400, "train") == drawn(400, "train") != drawn(400, "train", seed=1)


def test_a_card_of_pairs_is_read_and_split_by_prompt(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "data/my_pairs").mkdir(parents=True)
    rows = [
        {"question": f"question {number // 2}", "chosen": f"yes {number}", "rejected": "no"} for number in range(1000)
    ]
    (tmp_path / "data/my_pairs/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = "adamba: {id: my_pairs, loader: hub, path: me/pairs, format: preference, columns: {prompt: question}}"
    (tmp_path / "my_pairs.md").write_text(f"---\n{own}\n---\n")
    monkeypatch.chdir(tmp_path)  # what `run_data.py download` brought stands in for the Hub

    def drawn(number: int, split: Any) -> list[tuple[str, str]]:
        options: dict[str, Any] = {"split": split, "seed": 0, "settings": {}, "data_files": {}}
        rows = preference_rows({"my_pairs": 1.0}, number, cards_dir=str(tmp_path), **options)
        assert all(row["source"] == "my_pairs" and row["tools"] == [] for row in rows)
        return [(row["prompt"][0]["content"], row["chosen"][0]["content"]) for row in rows]

    held_out, trained = set(drawn(1000, "test")), set(drawn(1200, "train"))
    assert 5 < len(held_out) < 50 and len(held_out) + len(trained) == 1000
    assert not {prompt for prompt, _ in held_out} & {prompt for prompt, _ in trained}
    (tmp_path / "data/my_pairs/rows.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(ValueError, match="my_pairs: holds no pair for the test split; give more, or num_eval"):
        drawn(3, "test")


def test_a_file_without_a_held_out_pair_says_so(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR))
    options: dict[str, Any] = {"seed": 0, "settings": {}, "data_files": {"pairs": str(path)}}
    assert len(preference_rows({"pairs": 1.0}, 3, split="train", **options)) == 3
    with pytest.raises(ValueError, match=r"pairs.jsonl: of its 1 pairs none is held out .*; give more, or num_eval_p"):
        preference_rows({"pairs": 1.0}, 3, split="test", **options)


def test_distinct_pairs_are_the_drawn_ones_without_repeats() -> None:
    settings = {"tic_tac_toe": {"random_start_fraction": 0.0, "opponent": "perfect"}}
    options: dict[str, Any] = {"split": "train", "seed": 0, "settings": settings, "data_files": {}}
    drawn = [json.dumps(row) for row in preference_rows({"tic_tac_toe": 1.0}, 400, **options)]
    kept = [json.dumps(row) for row in preference_rows({"tic_tac_toe": 1.0}, 400, distinct=True, **options)]
    assert len(set(drawn)) < len(drawn)
    assert kept == list(dict.fromkeys(drawn))


def test_imitated_sources_have_no_worse_turn_and_must_be_in_the_mix() -> None:
    options: dict[str, Any] = {"split": "train", "seed": 0, "settings": {}, "data_files": {}}
    mix = {"calculator": 1.0, "tic_tac_toe": 1.0}
    for row in preference_rows(mix, 40, imitated=["calculator"], **options):
        assert (row["chosen"] == row["rejected"]) == (row["source"] == "calculator")
    with pytest.raises(
        ValueError,
        match=r"imitated: 'sudoku' is not in the mix \(calculator, tic_tac_toe\); give --imitated '\[\]' too",
    ):
        preference_rows(mix, 40, imitated=["sudoku"], **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not valid JSON"),
        (json.dumps(PAIR) + "\n[]", "line 2: key 'prompt'"),
        (json.dumps(PAIR | {"chosen": "8"}), "line 1: key 'chosen'"),
        (json.dumps(PAIR | {"rejected": []}), "line 1: key 'rejected'"),
        (json.dumps(PAIR | {"rejected": [{"content": "9"}]}), "line 1: key 'rejected'"),
        (
            json.dumps(PAIR | {"prompt": [{"role": "developer", "content": "x"}]}),
            "line 1: key 'prompt': an unknown role",
        ),
        (json.dumps(PAIR | {"prompt": [{"role": "user", "content": [{}]}]}), "line 1: key 'prompt': .* not text"),
        (
            json.dumps(PAIR | {"chosen": [{"role": "assistant", "content": "<|im_end|>"}]}),
            "line 1: .* a control token",
        ),
        (json.dumps(PAIR | {"chosen": [*USER, *GOOD]}), "line 1: an answer with turns of others"),
        (
            json.dumps(PAIR | {"rejected": [*BAD, {"role": "tool", "content": "7"}, *BAD]}),
            "line 1: an answer with turns of others",
        ),
        (json.dumps(PAIR | {"rejected": GOOD}), "line 1: chosen and rejected are the same"),
        (json.dumps(PAIR | {"tools": 5}), "line 1: tools that are not a list"),
        (json.dumps(PAIR | {"tools": "calculator"}), "line 1: tools that are not JSON"),
        (json.dumps(PAIR | {"tools": [5]}), "line 1: a function without a name"),
        (
            json.dumps(PAIR | {"prompt": [{"role": "user", "content": "\ud800"}]}),
            "line 1: text that is not Unicode",
        ),
        ("\n\n", "holds no trajectories"),
    ],
)
def test_bad_trajectories_are_refused_by_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"pairs.jsonl: {message}") as error:
        read_pairs(str(path))
    assert "\n" not in str(error.value)


def test_other_line_separators_may_stand_inside_a_text(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    pair = PAIR | {"prompt": [{"role": "user", "content": "a\u2028b\u0085c"}]}
    path.write_text(json.dumps(pair, ensure_ascii=False) + "\r\n", encoding="utf-8")
    [row] = read_pairs(str(path))
    assert row["prompt"][0]["content"] == "a\u2028b\u0085c"
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match=r"pairs.jsonl: cannot read these trajectories: not UTF-8 at byte 12"):
        read_pairs(str(path))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match="nowhere.jsonl: cannot read"):
        read_pairs("nowhere.jsonl")


@pytest.mark.parametrize("written", ["list", "text", "bare"])
def test_tools_of_a_pair_are_schemas_however_they_are_written(written: str, tmp_path: Path) -> None:
    """JSON text, as columns of tables hold it, would be a list of its characters."""
    path = tmp_path / "pairs.jsonl"
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    schemas = [{"type": "function", "function": function}]
    tools = {"list": schemas, "text": json.dumps(schemas), "bare": [function]}[written]
    path.write_text(json.dumps(PAIR | {"tools": tools}))
    options: dict[str, Any] = {"split": "train", "seed": 0, "settings": {}, "data_files": {"pairs": str(path)}}
    assert preference_rows({"pairs": 1.0}, 1, **options)[0]["tools"] == schemas


@pytest.mark.parametrize("cell", ["9" * 30, "-9223372036854775809", "NaN"])
def test_a_number_that_the_table_cannot_hold_is_rejected_as_it_was_written(cell: str, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "play", "arguments": {"cell": json.loads(cell)}}}
    pair = PAIR | {"rejected": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    options: dict[str, Any] = {"split": "train", "seed": 0, "settings": {}}
    [row] = preference_rows({"pairs": 1.0}, 1, data_files={"pairs": str(tmp_path / "pairs.jsonl")}, **options)
    text, _ = render_jinja_template([row["rejected"]], chat_template=CHAT_TEMPLATE)
    assert f'"arguments": {{"cell": {cell}}}' in text[0]


def test_a_pair_keeps_all_of_a_tools_schema(tmp_path: Path) -> None:
    """What a checkpoint played with is what it learns from, the type of the result included."""
    row = TASKS["calculator"].preference(1, "train")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row))
    assert read_pairs(str(path))[0]["tools"] == row["tools"]


def test_a_byte_order_mark_is_no_part_of_the_first_pair(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR), encoding="utf-8-sig")
    assert len(read_pairs(str(path))) == 1
