import hashlib
from types import SimpleNamespace

import pytest

from adamba.data import download as download_module
from adamba.data import load_card
from adamba.data.download import choose_files, download
from adamba.errors import UserError

CONTENT = {
    "README.md": b"# card",
    "data/a.parquet": b"first",
    "data/b.parquet": b"second",
    "data/c.json.gz": b"third",
    "script.py": b"print()",
}


def entry(name, data):
    lfs = SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) if name.endswith("parquet") else None
    blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    return SimpleNamespace(rfilename=name, size=len(data), lfs=lfs, blob_id=blob)


@pytest.fixture
def hub(monkeypatch):
    """A Hub repository in memory; `fetched` lists what was asked for, `content` is what it sends."""
    state = SimpleNamespace(fetched=[], content=dict(CONTENT))

    class Api:
        def dataset_info(self, path, revision, files_metadata):
            assert files_metadata
            return SimpleNamespace(sha="abc", siblings=[entry(name, data) for name, data in CONTENT.items()])

    def fetch(path, name, *, repo_type, revision, local_dir):
        assert (repo_type, revision) == ("dataset", "abc")
        state.fetched.append(name)
        target = local_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(state.content[name])

    monkeypatch.setattr(download_module, "HfApi", Api)
    monkeypatch.setattr(download_module, "hf_hub_download", fetch)
    return state


def test_data_files_are_fetched_verified_and_not_fetched_again(hub, tmp_path):
    card = load_card("openorca")
    paths = download(card, folder=tmp_path)
    assert [path.name for path in paths] == ["a.parquet", "b.parquet", "c.json.gz"]
    assert hub.fetched == ["data/a.parquet", "data/b.parquet", "data/c.json.gz"]
    (tmp_path / "openorca/data/b.parquet").write_bytes(b"seconx")
    download(card, folder=tmp_path)
    assert hub.fetched[3:] == ["data/b.parquet"]


def test_the_first_files_only(hub, tmp_path):
    assert len(download(load_card("fineweb"), max_files=1, folder=tmp_path)) == 1
    assert hub.fetched == ["data/a.parquet"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("data/a.parquet", b"firs", r"a\.parquet: 4 bytes, the Hub says 5; delete it"),
        ("data/a.parquet", b"fIrst", "its sha256 is not the Hub's"),
        ("data/c.json.gz", b"thIrd", "its content is not the Hub's"),
    ],
)
def test_a_file_that_is_not_what_the_hub_says_is_refused(hub, tmp_path, name, data, message):
    hub.content[name] = data
    with pytest.raises(UserError, match=message):
        download(load_card("openorca"), folder=tmp_path)


def test_patterns_of_the_card_choose_the_files():
    entries = [SimpleNamespace(rfilename=name) for name in ("b.json", "a.json", "sub/a.json", "x.txt")]
    assert [item.rfilename for item in choose_files(entries, ["a.json"])] == ["a.json"]
    assert [item.rfilename for item in choose_files(entries, [])] == ["a.json", "b.json", "sub/a.json", "x.txt"]


def test_without_network_the_error_says_where_to_put_files(monkeypatch, tmp_path):
    class Api:
        def dataset_info(self, *args, **kwargs):
            raise ConnectionError("offline")

    monkeypatch.setattr(download_module, "HfApi", Api)
    with pytest.raises(UserError, match="fallback conceptofmind/cot_submix_original.*flan_cot/ or pass them"):
        download(load_card("flan_cot"), folder=tmp_path)
    with pytest.raises(UserError, match="toolbench: nothing to download.*toolbench.md"):
        download(load_card("toolbench"), folder=tmp_path)
