import itertools
import json
from pathlib import Path

import datasets
import pyarrow
import pytest
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetNotFoundError
from torch.utils.data import DataLoader

from adamba.data import load_card, load_mixture, pack_rows, sources
from adamba.data.formats import FORMATS
from adamba.errors import UserError

ROWS = Path(__file__).parent / "rows"
FORMAT_OF = {
    "fineweb": "text",
    "openorca": "openorca",
    "flan_cot": "flan",
    "metamath": "metamath",
    "glaive_fc": "glaive",
    "toolbench": "toolbench",
    "sharegpt": "sharegpt",
}
IS_HELD_OUT = sources.is_held_out
FILES = {source: str(ROWS / f"{name}.jsonl") for source, name in FORMAT_OF.items()}


@pytest.fixture(autouse=True)
def no_held_out_rows(monkeypatch, tmp_path):
    """These files have ten rows; hold none of them out, and look for no downloads in the working directory."""
    monkeypatch.setattr(sources, "is_held_out", lambda record: False)
    monkeypatch.setattr(sources, "MAX_DROPPED_FRACTION", 1.0)
    monkeypatch.chdir(tmp_path)


def key(row):
    return json.dumps(row, sort_keys=True)


def good_records(source):
    records = map(json.loads, Path(FILES[source]).read_text(encoding="utf-8").splitlines())
    return [record for record in records if record["_drops"] is None]


@pytest.mark.parametrize("source", FORMAT_OF)
def test_each_registered_dataset_loads_from_a_local_file(source, tokenizer):
    stream = load_mixture({source: 1}, split="train", seed=0, data_files={source: FILES[source]})
    rows = list(itertools.islice(stream, len(good_records(source))))
    converted = [FORMATS[FORMAT_OF[source]].convert(record) | {"source": source} for record in good_records(source)]
    assert sorted(map(key, rows)) == sorted(map(key, converted))
    assert next(iter(pack_rows(stream, tokenizer, 512)))["source"] == source


def test_all_seven_mix(tokenizer):
    stream = load_mixture(dict.fromkeys(FILES, 1), split="train", seed=0, data_files=FILES)
    rows = list(itertools.islice(stream, 300))
    assert {row["source"] for row in rows} == set(FILES)
    mixed = load_mixture(
        {"calculator": 1, "glaive_fc": 1}, split="train", seed=0, data_files={"glaive_fc": FILES["glaive_fc"]}
    )
    assert {row["source"] for row in itertools.islice(mixed, 50)} == {"calculator", "glaive_fc"}


def many(path: Path, number: int, files: int = 1) -> Path:
    path.mkdir()
    for part in range(files):
        lines = [json.dumps({"text": f"row {index}"}) for index in range(part, number, files)]
        (path / f"{part}.jsonl").write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("num_files", [1, 3, 4])
def test_two_ranks_with_two_workers_read_every_row_of_local_files_once(tmp_path, num_files, monkeypatch):
    folder = many(tmp_path / "data", 101, num_files)
    monkeypatch.setattr(sources, "is_held_out", lambda record: True)
    seen = []
    for rank in range(2):
        stream = load_mixture({"fineweb": 1}, split="test", seed=0, data_files={"fineweb": str(folder)})
        stream = split_dataset_by_node(stream, rank=rank, world_size=2)
        seen += [row["text"] for row in DataLoader(stream, batch_size=None, num_workers=2)]
    assert sorted(seen) == sorted(f"row {index}" for index in range(101))


def test_copies_that_differ_in_an_id_stay_on_one_side_of_the_split(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "is_held_out", IS_HELD_OUT)
    records = [
        {"id": f"flan.{number}", "system_prompt": "", "question": f"q{number % 300}", "response": "a"}
        for number in range(1500)
    ]
    file = tmp_path / "orca.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))

    def questions(split, number):
        stream = load_mixture({"openorca": 1}, split=split, seed=0, data_files={"openorca": str(file)})
        return [row["messages"][0]["content"] for row in itertools.islice(stream, number)]

    held_out = questions("test", 1500)
    trained = questions("train", 1500 - len(held_out))
    assert len(set(held_out)) > 1 and len(held_out) == 5 * len(set(held_out))
    assert set(held_out) | set(trained) == {f"q{number}" for number in range(300)}
    assert not set(held_out) & set(trained)


def test_a_folder_of_one_text_a_file_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "is_held_out", IS_HELD_OUT)
    monkeypatch.setattr(sources, "MIN_SHARD_BYTES", 1)
    for index in range(170):
        (tmp_path / f"{index:03}.txt").write_text(f"text {index}")
    streams = {
        split: load_mixture({"fineweb": 1}, split=split, seed=0, data_files={"fineweb": str(tmp_path)})
        for split in ("train", "test")
    }
    assert streams["train"].num_shards == 3
    test = {row["text"] for row in streams["test"]}
    train = {row["text"] for row in itertools.islice(streams["train"], 170)}
    assert test and not test & train and len(test | train) == 170


def test_small_files_are_joined_and_large_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MIN_SHARD_BYTES", 100)
    paths = [tmp_path / f"{index}.json" for index in range(6)]
    for path, size in zip(paths, (100, 60, 60, 200, 10, 10), strict=True):
        path.write_text("x" * size)
    shards = sources.join_files(paths)
    assert [len(shard) for shard in shards] == [1, 2, 3]
    assert [path for shard in shards for path in shard] == [str(path) for path in paths]


def test_a_file_that_is_held_out_whole_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "is_held_out", lambda row: True)
    (tmp_path / "a.txt").write_text("text")
    stream = load_mixture({"fineweb": 1}, split="train", seed=0, data_files={"fineweb": str(tmp_path)})
    with pytest.raises(UserError, match=r"fineweb: nothing to train on in .*a\.txt: what it holds \(1\) is held out"):
        next(iter(stream))


def test_training_rows_are_shuffled_by_seed_and_complete(tmp_path):
    folder = many(tmp_path / "data", 2500)

    def first_pass(seed):
        stream = load_mixture({"fineweb": 1}, split="train", seed=seed, data_files={"fineweb": str(folder)})
        return [row["text"] for row in itertools.islice(stream, 2500)]

    assert first_pass(1) == first_pass(1) != first_pass(2)
    assert sorted(first_pass(1)) == sorted(f"row {index}" for index in range(2500))


def test_resume_in_the_middle_of_a_shuffled_block_is_exact(tmp_path):
    folder = many(tmp_path / "data", 2500, 2)

    def stream():
        return load_mixture(
            {"fineweb": 1, "calculator": 1}, split="train", seed=1, data_files={"fineweb": str(folder)}
        )

    first = stream()
    iterator = iter(first)
    for _ in range(700):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    expected = list(itertools.islice(iterator, 400))
    second = stream()
    second.load_state_dict(state)
    assert list(itertools.islice(second, 400)) == expected


def test_held_out_rows_are_about_one_in_fifty_and_never_trained_on(tmp_path, monkeypatch):
    monkeypatch.undo()
    folder = many(tmp_path / "data", 3000)
    streams = {
        split: load_mixture({"fineweb": 1}, split=split, seed=0, data_files={"fineweb": str(folder)})
        for split in ("train", "test")
    }
    test = {row["text"] for row in streams["test"]}
    train = {row["text"] for row in itertools.islice(streams["train"], 3000 - len(test))}
    assert 30 < len(test) < 95
    assert not test & train and len(test | train) == 3000


def test_local_files_of_a_dataset_with_a_test_split_are_split_here(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "is_held_out", IS_HELD_OUT)
    folder = many(tmp_path / "data", 1000)
    (tmp_path / "mine.md").write_text(
        "---\nadamba: {id: mine, loader: hub, path: me/mine, format: text, splits: {train: train, test: test}}\n---\nx"
    )
    options = {"seed": 0, "data_files": {"mine": str(folder)}, "cards_dir": str(tmp_path)}
    test = {row["text"] for row in load_mixture({"mine": 1}, split="test", **options)}
    train = {row["text"] for row in itertools.islice(load_mixture({"mine": 1}, split="train", **options), 1000)}
    assert test and not test & train and len(test | train) == 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt": "x", "reply": "y"}',
            r"openorca: column 'question' not found, the data has prompt, reply;.*needs question",
        ),
        ("", "openorca: nothing to train on in .*: it holds no record"),
        ('{"question": "", "response": "y"}', r"1 of 1 rows dropped \(an empty question 1\)"),
        ('{"question": "x", "resp', "line 1, byte 0, is cut off"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        next(iter(load_mixture({"openorca": 1}, split="train", seed=0, data_files={"openorca": str(path)})))
    assert "\n" not in str(error.value)


def test_too_many_dropped_rows_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DROPPED_FRACTION", 0.5)
    path = tmp_path / "data.jsonl"
    good, bad = '{"question": "x", "response": "y"}', '{"question": "x", "response": ""}'
    path.write_text("\n".join([good, bad, bad] * 40))
    stream = load_mixture({"openorca": 1}, split="train", seed=0, data_files={"openorca": str(path)})
    with pytest.raises(
        UserError, match=r"openorca: 6\d of 10[01] rows dropped \(an empty answer 6\d\); is 'openorca' the right"
    ):
        list(itertools.islice(stream, 40))


def test_columns_are_renamed_by_the_card(tmp_path):
    cards = tmp_path / "cards"
    cards.mkdir()
    (cards / "mine.md").write_text(
        "---\nadamba: {id: mine, loader: files, format: metamath, columns: {query: instruction, response: output}}\n"
        "---\nx"
    )
    (tmp_path / "a.json").write_text('[{"instruction": "q", "output": "a"}]')
    stream = load_mixture(
        {"mine": 1}, split="train", seed=0, data_files={"mine": str(tmp_path / "a.json")}, cards_dir=str(cards)
    )
    assert next(iter(stream))["messages"][0] == {"role": "user", "content": "q"}
    with pytest.raises(UserError, match="mine: it lives in no repository.*--data_files mine="):
        load_mixture({"mine": 1}, split="train", seed=0, cards_dir=str(cards))


def test_files_for_a_source_outside_the_mix_are_refused(tmp_path):
    with pytest.raises(UserError, match="data_files: 'openorca' is not in the mix"):
        load_mixture({"calculator": 1}, split="train", seed=0, data_files={"openorca": "x"})


def test_without_network_the_error_says_how_to_pass_files(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(sources, "load_dataset", unreachable)
    for source in ("fineweb", "openorca", "flan_cot", "metamath", "glaive_fc", "sharegpt"):
        with pytest.raises(
            UserError, match=f"{source}: the Hub dataset .* cannot be read.*--data_files {source}="
        ) as error:
            load_mixture({source: 1}, split="train", seed=0)
        assert "\n" not in str(error.value)


def test_hub_rows_are_streamed_by_shard_and_fall_back(monkeypatch, caplog):
    asked = []

    def hub(path, config, **options):
        asked.append((path, options["split"], options["streaming"]))
        if path == "conceptofmind/FLAN2021_CoT":
            raise DatasetNotFoundError("no such dataset")
        table = [{"inputs": f"q{index}", "targets": f"a{index}"} for index in range(20)]
        return datasets.Dataset.from_list(table).to_iterable_dataset(num_shards=4)

    monkeypatch.setattr(sources, "load_dataset", hub)
    stream = load_mixture({"flan_cot": 1}, split="train", seed=0)
    questions = [row["messages"][0]["content"] for row in itertools.islice(stream, 20)]
    assert sorted(questions) == sorted(f"q{index}" for index in range(20))
    assert asked[0] == ("conceptofmind/FLAN2021_CoT", "train", True)
    assert "reading conceptofmind/cot_submix_original" in caplog.text


def test_calls_from_the_hub_have_their_own_arguments_only(monkeypatch):
    def chat(name, arguments):
        call = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
        return {"messages": [{"role": "user", "content": "q"}, call], "tools": [{"name": "weather"}, {"name": "add"}]}

    rows = pyarrow.Table.from_pylist([chat("weather", {"city": "Rome"}), chat("add", {"a": 1})])
    table = datasets.Dataset(rows).to_iterable_dataset()
    monkeypatch.setattr(sources, "load_dataset", lambda *args, **options: table)
    Path("mine.md").write_text("---\nadamba: {id: mine, loader: hub, path: me/mine, format: messages}\n---\nx")
    stream = load_mixture({"mine": 1}, split="train", seed=0, cards_dir=str(Path.cwd()))
    calls = [row["messages"][1]["tool_calls"][0]["function"] for row in itertools.islice(stream, 2)]
    assert sorted(map(key, calls)) == [
        '{"arguments": {"a": 1}, "name": "add"}',
        '{"arguments": {"city": "Rome"}, "name": "weather"}',
    ]


def test_downloaded_folder_stands_in_for_the_hub(tmp_path):
    (tmp_path / "data/metamath").mkdir(parents=True)
    (tmp_path / "data/metamath/a.jsonl").write_text('{"query": "q", "response": "a"}')
    assert next(iter(load_mixture({"metamath": 1}, split="train", seed=0)))["messages"][1]["content"] == "a"


def test_unknown_format_of_a_card(tmp_path):
    (tmp_path / "mine.md").write_text("---\nadamba: {id: mine, loader: files, format: orca}\n---\nx")
    with pytest.raises(UserError, match=r"mine\.md: key 'adamba\.format' is 'orca', expected one of text, messages"):
        sources.Conversion(load_card("mine", tmp_path))
