"""Memory of large tensors: used again, and in pages as large as Linux gives."""

import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch

M_MMAP_THRESHOLD = -3  # malloc.h
LIBC = ctypes.CDLL(None)
LARGE = 2**22  # bytes of a tensor from which its memory is used again
PAGE = 2**21
KEPT = 2**30  # bytes; how much of what is free stays here

_free: list[mmap.mmap] = []  # latest last
_lock = threading.RLock()  # the collector may free a tensor inside of it


def return_freed_memory() -> None:
    """
    Let glibc give freed tensors back to the system. By itself it keeps blocks of up to 32 MB for later, and a model of
    64 layers leaves gigabytes of holes between them.
    """
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(M_MMAP_THRESHOLD, 2**20)


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """
    `torch.empty`; a large tensor takes the memory of one that is gone, or new memory in pages of 2 MiB. The first
    touch of new memory takes up to ten times as long as reading a file into it, and a streamed tensor is touched only
    once or twice.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < LARGE:
        return torch.empty(shape, dtype=dtype)
    region = _take(num_bytes)
    memory = np.frombuffer(region, dtype=np.uint8)
    weakref.finalize(memory, _give_back, region).atexit = False  # the tensor holds it, as do views of the tensor
    return torch.from_numpy(memory)[:num_bytes].view(dtype).view(shape)


def _take(num_bytes: int) -> mmap.mmap:
    with _lock:
        fitting = [region for region in _free if num_bytes <= len(region) <= 2 * num_bytes]
        if fitting:
            region = min(fitting, key=len)
            _free.remove(region)
            return region
    region = mmap.mmap(-1, -(-num_bytes // PAGE) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return region


def _give_back(region: mmap.mmap) -> None:
    with _lock:
        _free.append(region)
        while sum(map(len, _free)) > KEPT:
            del _free[0]  # which unmaps it


def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)` in the memory of `empty`."""
    return tensor if tensor.dtype == dtype else empty(tensor.shape, dtype).copy_(tensor)
