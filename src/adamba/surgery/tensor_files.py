"""
Safetensors a tensor at a time. The library maps a whole file to read it, whose pages count as this process's memory,
and needs all tensors of a file at once to write it.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch

from .memory import empty

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE = 2**24  # bytes; read at once while converting
SYNCED = 2**28  # bytes; written before they go to the disk
MAKERS = 2  # tensors made at the same time, while another one is written


def read_header(path: Path) -> tuple[int, dict[str, dict]]:
    """Where a file's data begin, and what it says about each tensor."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return 8 + size, header


def read_tensor(
    path: Path, begin: int, entry: Mapping, dtype: torch.dtype, through: torch.dtype | None = None
) -> torch.Tensor:
    """
    One tensor.

    Args:
        begin, entry: from `read_header`.
        dtype: what it becomes.
        through: a type that it is rounded to on the way.

    Raises:
        OSError: the file ends before the tensor does.
    """
    stored = DTYPES[entry["dtype"]]
    result = empty(entry["shape"], dtype)
    pieces = result.view(-1).split(PIECE // stored.itemsize)
    buffer = None if stored == dtype else torch.empty(PIECE // stored.itemsize, dtype=stored)
    with path.open("rb", buffering=0) as file:
        file.seek(begin + entry["data_offsets"][0])
        for piece in pieces:
            into = piece if buffer is None else buffer[: len(piece)]
            view = memoryview(into.view(torch.uint8).numpy())
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError(f"{path} ends early: truncated or overwritten")
                view = view[count:]
            if buffer is not None or (through or dtype) != dtype:
                piece.copy_(into if through is None else into.to(through))
    return result


def header_bytes(shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> bytes:
    """How a file of these tensors begins, in this order, to the byte as the library writes it."""
    label = next(label for label, known in DTYPES.items() if known == dtype)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + shape.numel() * dtype.itemsize
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_written(path: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> bool:
    """Whether a file of these tensors is there as `write_files` leaves it, by its header and its size."""
    header = header_bytes({name: shapes[name] for name in sorted(shapes)}, dtype)
    size = len(header) + sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def write_files(
    files: Mapping[Path, Mapping[str, torch.Size]],
    dtype: torch.dtype,
    make: Callable[[str], torch.Tensor],
    progress: Callable[[int], object],
) -> None:
    """
    Write each tensor once, straight to its place, while the next ones are made and finished files go to the disk:
    when this returns all are on it, as a power cut must not undo an hour. A file gets its name once it is on the disk.

    Args:
        files: path -> name -> shape.
        make: the tensor of a name; called from other threads.
        progress: told the bytes of each tensor written.
    """
    names = iter([name for shapes in files.values() for name in sorted(shapes)])
    with ThreadPoolExecutor(MAKERS) as makers, ThreadPoolExecutor(1) as syncer:
        made = _ahead(makers, make, names)
        synced: list[Future] = []
        waiting = 0
        try:
            for path, shapes in files.items():
                part = path.with_name(f"{path.name}.part")
                with part.open("wb") as file:
                    file.write(header_bytes({name: shapes[name] for name in sorted(shapes)}, dtype))
                    for _ in shapes:
                        tensor = next(made)
                        file.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
                        progress(tensor.nbytes)
                        waiting += tensor.nbytes
                        del tensor  # before the next one is waited for
                        if waiting >= SYNCED:
                            synced.append(syncer.submit(_sync, part))
                            waiting = 0
                synced.append(syncer.submit(_finish, part, path))
            for future in synced:
                future.result()
        finally:
            makers.shutdown(cancel_futures=True)


def _ahead(pool: ThreadPoolExecutor, make: Callable, names: Iterator[str]) -> Iterator[torch.Tensor]:
    """`make` of each name in order, never more than `MAKERS` of them begun and not yet taken."""
    begun = [pool.submit(make, name) for name in islice(names, MAKERS)]
    while begun:
        tensor = begun.pop(0).result()
        begun += [pool.submit(make, name) for name in islice(names, 1)]
        yield tensor
        del tensor


def _sync(part: Path) -> None:
    """To the disk, and out of memory: what is written next takes its pages, as new ones cost more than the disk."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _finish(part: Path, path: Path) -> None:
    _sync(part)
    part.replace(path)
