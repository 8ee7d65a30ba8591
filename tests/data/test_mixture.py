import itertools
import json
from collections import Counter

import pytest
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from adamba.data import load_mixture, log_mix, materialise, parse_mix
from adamba.data.python_docs import python_docs_rows
from adamba.data.render import Renderer
from adamba.tasks import TASKS

MIX = {"calculator": 1.0, "tic_tac_toe": 0.5, "pydoc_topics": 0.5}


def take(stream, number):
    return list(itertools.islice(stream, number))


def keys(rows):
    return [json.dumps(row, sort_keys=True) for row in rows]


def test_parse_and_log():
    mix = parse_mix("calculator=1.0, tic_tac_toe=0.5,pydoc_topics=0")
    assert mix == {"calculator": 1.0, "tic_tac_toe": 0.5}
    assert log_mix(mix) == "calculator 1.0 (66.7 %), tic_tac_toe 0.5 (33.3 %)"
    assert parse_mix({"a": 2}) == {"a": 2.0}


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("", "it is empty"),
        ({}, "it is empty"),
        ("calculator", "'calculator' has no weight, write calculator=1.0"),
        ("calculator=x", "'calculator' is 'x', expected a number"),
        ({"calculator": None}, "'calculator' is None, expected a number"),
        ("calculator=-1", "'calculator' is -1, expected a finite number of at least 0"),
        ("calculator=nan", "'calculator' is nan"),
        ("calculator=0,tic_tac_toe=0", r"all weights are 0 \(calculator, tic_tac_toe\)"),
        ("calculater=1", "did you mean 'calculator'"),
    ],
)
def test_bad_mixes_are_refused(mix, message):
    with pytest.raises(ValueError, match=message):
        load_mixture(mix, split="train", seed=0)


def test_bad_split_and_settings_are_refused():
    with pytest.raises(ValueError, match="split: 'dev' is unknown"):
        load_mixture(MIX, split="dev", seed=0)
    with pytest.raises(ValueError, match="settings: 'chess' is no task"):
        load_mixture(MIX, split="train", seed=0, settings={"chess": {}})


def test_rows_have_their_shape_and_source():
    rows = take(load_mixture(MIX, split="train", seed=0), 200)
    for row in rows:
        if row["source"] == "pydoc_topics":
            assert row.keys() == {"text", "source"}
        else:
            assert row.keys() == {"messages", "tools", "source"}
            arguments = row["messages"][1]["tool_calls"][0]["function"]["arguments"]
            assert arguments.keys() == ({"expression"} if row["source"] == "calculator" else {"cell"})
    assert {row["source"] for row in rows} == set(MIX)


def test_same_seed_same_rows_other_seed_other_rows():
    first = keys(take(load_mixture(MIX, split="train", seed=3), 60))
    assert first == keys(take(load_mixture(MIX, split="train", seed=3), 60))
    assert first != keys(take(load_mixture(MIX, split="train", seed=4), 60))


def test_proportions_are_within_one_percent_over_20000_rows(monkeypatch):
    stub = type("Stub", (), {"example": staticmethod(lambda seed, split: {"messages": [], "tools": []})})
    monkeypatch.setitem(TASKS, "calculator", stub)
    stream = load_mixture({"calculator": 3.0, "pydoc_topics": 1.0}, split="train", seed=1)
    counts = Counter(row["source"] for row in itertools.islice(stream, 20_000))
    assert abs(counts["calculator"] / 20_000 - 0.75) < 0.01


def test_train_and_test_never_share_an_instance():
    train, test = (
        {row["messages"][1]["tool_calls"][0]["function"]["arguments"]["expression"] for row in rows}
        for rows in (take(load_mixture({"calculator": 1}, split=split, seed=0), 500) for split in ("train", "test"))
    )
    assert not train & test


def test_python_docs_split_shares_no_paragraph():
    train, test = (
        {part for row in python_docs_rows(split) for part in row["text"].split("\n\n") if len(part) > 40}
        for split in ("train", "test")
    )
    assert len(train) > 500 and len(test) > 50
    assert not train & test


def test_test_split_of_a_dataset_passes_once():
    rows = take(load_mixture({"pydoc_topics": 1}, split="test", seed=0), 10_000)
    assert sorted(row["text"] for row in rows) == sorted(row["text"] for row in python_docs_rows("test"))


def test_test_split_of_several_datasets_holds_each_row_once(tmp_path):
    options = {"split": "test", "seed": 0, "data_files": {"fineweb": str(tmp_path / "few.jsonl")}}
    (tmp_path / "few.jsonl").write_text("\n".join(json.dumps({"text": f"row {number}"}) for number in range(500)))
    rows = keys(load_mixture({"pydoc_topics": 1, "fineweb": 1}, **options))
    alone = [*load_mixture({"pydoc_topics": 1}, split="test", seed=0), *load_mixture({"fineweb": 1}, **options)]
    assert sorted(rows) == sorted(keys(alone)) and len(alone) > 10
    endless = take(load_mixture({"calculator": 1, "fineweb": 1}, **options), 200)
    assert len(set(keys(endless))) == 200, "tasks go on when the dataset has ended"


@pytest.mark.parametrize("mix", [{"pydoc_topics": 1}, {"calculator": 1, "tic_tac_toe": 1}])
def test_two_ranks_with_two_workers_read_every_row_once(mix):
    seen = []
    for rank in range(2):
        stream = split_dataset_by_node(load_mixture(mix, split="test", seed=0), rank=rank, world_size=2)
        loader = DataLoader(stream, batch_size=None, num_workers=2)
        seen += keys(take(loader, 10_000 if "pydoc_topics" in mix else 150))
    if "pydoc_topics" in mix:
        assert sorted(seen) == sorted(keys(load_mixture(mix, split="test", seed=0)))
    else:
        games = [row for row in seen if "calculator" in row]
        assert len(set(games)) == len(games)


def test_resume_is_exact():
    stream = load_mixture(MIX, split="train", seed=5)
    iterator = iter(stream)
    for _ in range(70):
        next(iterator)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = keys(itertools.islice(iterator, 50))
    resumed = load_mixture(MIX, split="train", seed=5)
    resumed.load_state_dict(state)
    assert keys(take(resumed, 50)) == expected


def test_a_materialised_row_keeps_a_number_of_any_size(tokenizer):
    """The table's own reader would hand over the whole message as one text."""
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"n": 10**30, "text": "ü"}}}]
    row = {"messages": [{"role": "assistant", "content": "", "tool_calls": calls}], "tools": []}
    [kept] = materialise([row], 1)
    assert Renderer(tokenizer).render([kept]) == Renderer(tokenizer).render([row])


def test_materialised_rows_keep_the_arguments_of_each_tool():
    dataset = materialise(load_mixture(MIX, split="train", seed=0), 60)
    rows = take(load_mixture(MIX, split="train", seed=0), 60)
    assert len(dataset) == 60
    for stored, row in zip(dataset, rows, strict=True):
        assert {name: value for name, value in stored.items() if value is not None} == row


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="the stream is empty"):
        materialise(load_mixture({"calculator": 1}, split="train", seed=0).take(0), 5)


def test_settings_reach_the_task(monkeypatch):
    seen = []

    def example(seed, split, **settings):
        seen.append(settings)
        return {"messages": [], "tools": []}

    monkeypatch.setitem(TASKS, "calculator", type("Stub", (), {"example": staticmethod(example)}))
    take(load_mixture({"calculator": 1}, split="train", seed=0, settings={"calculator": {"max_depth": 2}}), 2)
    assert seen == [{"max_depth": 2}] * 2


def test_each_rank_draws_its_sources_in_an_order_of_its_own(tmp_path):
    def sources_of(rank, num_ranks, **changes):
        options = {"split": "train", "seed": 0, "rank": rank, "num_ranks": num_ranks} | changes
        stream = load_mixture(options.pop("mix", MIX), **options)
        if stream.num_shards >= num_ranks:
            stream = stream.shard(num_ranks, rank)
        return [row["source"] for row in itertools.islice(stream, 300)]

    first, second, third = (sources_of(rank, 4) for rank in range(3))
    assert sources_of(0, 1) == first  # alone as ever
    assert first != second != third != first
    assert sources_of(1, 4) == second and set(second) == set(MIX)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{number}"}) for number in range(99)))
    short = {"mix": {"fineweb": 1.0, "calculator": 1.0}, "data_files": {"fineweb": str(tmp_path / "a.jsonl")}}
    assert sources_of(0, 2, **short) == sources_of(1, 2, **short)  # one shard: both read it all, and share the rows
