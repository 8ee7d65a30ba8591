"""Tensors of safetensors files one at a time: the library's values, and its bytes."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adamba.surgery import memory, tensor_files
from adamba.surgery.memory import empty
from adamba.surgery.tensor_files import is_written, read_header, read_tensor, write_files


def some_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b": (7, 5), "a": (300,), "scalar": (), "none": (0, 3)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_files_are_those_of_the_library_and_are_read_as_it_reads_them(dtype: torch.dtype, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tensor_files, "PIECE", 64)  # several pieces a tensor, the last one short
    tensors = some_tensors(dtype)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    written: list[int] = []
    write_files({tmp_path / "ours": shapes}, dtype, tensors.__getitem__, written.append)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())
    assert is_written(tmp_path / "theirs", shapes, dtype) and not (tmp_path / "ours.part").exists()
    begin, header = read_header(tmp_path / "theirs")
    for name, tensor in load_file(tmp_path / "theirs").items():
        for into in (dtype, torch.float32):
            assert torch.equal(read_tensor(tmp_path / "theirs", begin, header[name], into), tensor.to(into))
        rounded = read_tensor(tmp_path / "theirs", begin, header[name], torch.float32, through=torch.bfloat16)
        assert torch.equal(rounded, tensor.to(torch.bfloat16).float())


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "cut")
    begin, header = read_header(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-4])
    with pytest.raises(OSError, match="cut ends early: truncated or overwritten"):
        read_tensor(tmp_path / "cut", begin, header["a"], torch.float32)


def test_only_a_whole_file_of_these_tensors_counts_as_written(tmp_path: Path) -> None:
    path, shapes = tmp_path / "x", {"a": torch.Size([100])}
    assert not is_written(path, shapes, torch.float32)
    write_files({path: shapes}, torch.float32, lambda _: torch.ones(100), lambda _: None)
    assert is_written(path, shapes, torch.float32)
    assert not is_written(path, {"b": torch.Size([100])}, torch.float32)
    assert not is_written(path, {"a": torch.Size([200])}, torch.bfloat16)
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_written(path, shapes, torch.float32)


def test_few_tensors_are_made_ahead_and_a_failure_stops_the_writing(tmp_path: Path) -> None:
    lock, alive, most = threading.Lock(), [0], [0]

    def make(name: str) -> torch.Tensor:
        if name == "t15":
            raise MemoryError("no room")
        with lock:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
        return torch.ones(3)

    def seen(_num_bytes: int) -> None:
        with lock:
            alive[0] -= 1

    shapes = {f"t{index:02}": torch.Size([3]) for index in range(20)}
    with pytest.raises(MemoryError, match="no room"):
        write_files({tmp_path / "x": shapes}, torch.float32, make, seen)
    assert most[0] <= tensor_files.MAKERS + 1


def test_memory_in_large_pages_is_ordinary_memory() -> None:
    tensor = empty((3, 2**20), torch.float32)
    assert tensor.shape == (3, 2**20) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert tensor.fill_(2).sum() == 6 * 2**20


def test_memory_is_used_again_once_no_view_of_it_is_left() -> None:
    first = empty((3, 2**20), torch.float32)
    place, view = first.data_ptr(), first[1:, :5]
    view.fill_(7)
    del first
    other = empty((3, 2**20), torch.float32)
    assert other.data_ptr() != place
    other.fill_(1)
    assert (view == 7).all()
    del view
    assert empty((2, 2**20), torch.float32).data_ptr() == place
    assert empty((2**20,), torch.float32).data_ptr() != place, "much larger memory waits for larger tensors"


def test_little_free_memory_is_kept(monkeypatch) -> None:
    monkeypatch.setattr(memory, "_free", [])
    monkeypatch.setattr(memory, "KEPT", 3 * 2**22)
    tensors = [empty((2**20,), torch.float32) for _ in range(5)]
    del tensors
    assert len(memory._free) == 3
