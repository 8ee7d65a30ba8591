import gzip
import io
import json
import logging
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adamba.data import files
from adamba.data.files import find_files, read_records
from adamba.errors import UserError

RECORDS = [{"id": index, "text": f"Zeile {index} „{'é' * (index % 7)}“ \\ \n [{{"} for index in range(500)]


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def array(**options) -> str:
    return json.dumps(RECORDS, ensure_ascii=False, **options)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", array()),
        ("indented.json", array(indent=4)),
        ("ascii.json", json.dumps(RECORDS)),
        ("bom.json", "\ufeff" + array()),
        ("one after another.json", "\n".join(json.dumps(record, indent=1) for record in RECORDS)),
        ("a.jsonl", "\n".join(json.dumps(record) for record in RECORDS)),
        ("blank lines.jsonl", "\n\n".join(json.dumps(record) for record in RECORDS) + "\n\n"),
    ],
)
@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_json_in_every_layout(tmp_path, monkeypatch, name, text, chunk):
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
    assert list(read_records(write(tmp_path / name, text))) == RECORDS


def test_parquet_csv_text_and_compressed(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet")) == RECORDS
    assert list(read_records(write(tmp_path / "a.csv", 'q,a\n"x, y",1\n'))) == [{"q": "x, y", "a": "1"}]
    assert list(read_records(write(tmp_path / "a.tsv", "q\ta\nx\t1\n"))) == [{"q": "x", "a": "1"}]
    assert list(read_records(write(tmp_path / "a.txt", "Hallo"))) == [{"text": "Hallo"}]
    assert list(read_records(write(tmp_path / "a.json.gz", gzip.compress(array().encode())))) == RECORDS


def test_objects_from_parquet_have_their_own_keys_only(tmp_path):
    records = [
        {"tools": None, "calls": [{"name": "weather", "arguments": {"city": "Rome", "at": {"hour": 1}}}]},
        {"tools": None, "calls": [{"name": "add", "arguments": {"a": 1, "of": [None, 2]}}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet")) == records


def test_csv_and_text_as_windows_writes_them(tmp_path, caplog):
    for name, expected in (("a.csv", {"q": "é", "a": "1"}), ("a.txt", {"text": "q,a\r\né,1\r\n"})):
        assert list(read_records(write(tmp_path / name, "\ufeffq,a\r\né,1\r\n"))) == [expected]
        path = write(tmp_path / name, "q,a\r\né,1\r\n".encode("cp1252"))
        with pytest.raises(UserError, match=rf"{name}: not UTF-8 a.*on_bad_file: skip"):
            list(read_records(path))
        assert not list(read_records(path, "skip")) and "not UTF-8" in caplog.text


def test_long_csv_fields_are_read_and_longer_ones_make_a_bad_file(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "a.csv", "text\nshort\n" + "a" * 200_000 + "\nlast\n")
    assert [len(record["text"]) for record in read_records(path)] == [5, 200_000, 4]
    monkeypatch.setattr(files, "MAX_RECORD_CHARACTERS", 1000)
    with pytest.raises(
        UserError, match=r"a\.csv: not CSV after line 2 \(field larger than field limit \(1000\)\); mend"
    ):
        list(read_records(path))
    assert list(read_records(path, "skip")) == [{"text": "short"}]
    assert "1 whole records kept" in caplog.text


def test_archives_and_folders(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("data/b.json", array())
        archive.writestr("readme.pdf", "no data")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        data = "\n".join(map(json.dumps, RECORDS)).encode()
        member = tarfile.TarInfo("x/c.jsonl")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub/d.json", array())
    write(tmp_path / "notes.pdf", "x")
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache/e.json", array())
    found = find_files(tmp_path)
    assert [path.name for path in found] == ["a.zip", "b.tar.gz", "d.json"]
    for path in found:
        assert list(read_records(path)) == RECORDS


def test_missing_and_empty_places_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no data file"):
        find_files(tmp_path)
    with pytest.raises(UserError, match="files of this kind are not read"):
        list(read_records(write(tmp_path / "a.pdf", "x")))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_a_truncated_array_stops_with_file_and_byte_or_keeps_whole_records(tmp_path, caplog, share):
    data = array(indent=1).encode()
    cut = data[: int(len(data) * share)]
    path = write(tmp_path / "cut.json", cut)
    with pytest.raises(UserError, match=r"cut\.json: cut off .*byte \d+") as error:
        list(read_records(path))
    assert "on_bad_file: skip" in str(error.value) and "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        kept = list(read_records(path, "skip"))
    whole = cut.count(b'"id"') - 1 if cut.rstrip()[-1:] not in b"}" else len(kept)
    assert kept == RECORDS[: len(kept)] and len(kept) >= whole > 50
    assert f"{len(kept)} whole records kept" in caplog.text


def test_the_byte_named_is_where_the_record_starts(tmp_path):
    data = array().encode()
    path = write(tmp_path / "cut.json", data[:-20])
    start = data.rindex(b'{"id"')
    with pytest.raises(UserError, match=rf"starts at byte {start} \(record 500\)"):
        list(read_records(path))


def test_broken_json_in_the_middle(tmp_path):
    text = '[{"a": 1}, {"a": 2, b: 3}, {"a": 4}' + " " * 50 + "]"
    path = write(tmp_path / "bad.json", text)
    with pytest.raises(UserError, match=r"bad\.json: not JSON in the record that starts at byte 11"):
        list(read_records(path))
    assert list(read_records(path, "skip")) == [{"a": 1}]


def test_broken_lines_are_skipped_one_by_one(tmp_path):
    path = write(tmp_path / "bad.jsonl", '{"a": 1}\n{"a": \n{"a": 3}\n{"a"')
    with pytest.raises(UserError, match=r"bad\.jsonl: line 2, byte 9, is not JSON"):
        list(read_records(path))
    assert list(read_records(path, "skip")) == [{"a": 1}, {"a": 3}]


def test_broken_parquet_and_archives(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    broken = {
        "b.parquet": (tmp_path / "a.parquet").read_bytes()[:-100],
        "c.zip": b"PK\x03\x04 not a zip",
        "d.tar": b"x" * 2000,
        "e.jsonl.gz": gzip.compress("\n".join(map(json.dumps, RECORDS)).encode())[:-50],
    }
    for name, data in broken.items():
        path = write(tmp_path / name, data)
        with pytest.raises(UserError, match=name):
            list(read_records(path))
        assert len(list(read_records(path, "skip"))) < 500


def test_records_that_are_no_objects_are_refused(tmp_path):
    with pytest.raises(UserError, match="record 2 is a list, expected an object"):
        list(read_records(write(tmp_path / "a.json", '[{"a": 1}, [2]]')))


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK_BYTES", 1 << 14)
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write("[" + ",".join(json.dumps({"text": "x" * 1000}) for _ in range(8000)) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_records(path)) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 10


@settings(max_examples=80, deadline=None)
@given(
    records=st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=3), max_size=8),
    cut=st.floats(0, 1),
    ascii_only=st.booleans(),
)
def test_any_array_cut_anywhere_gives_a_prefix(tmp_path_factory, records, cut, ascii_only):
    try:
        data = json.dumps(records, ensure_ascii=ascii_only).encode()
    except UnicodeEncodeError:
        return
    path = tmp_path_factory.mktemp("cut") / "a.json"
    path.write_bytes(data[: int(len(data) * cut)])
    kept = list(read_records(path, "skip"))
    assert kept == records[: len(kept)]
    assert cut < 1 or len(kept) == len(records)
