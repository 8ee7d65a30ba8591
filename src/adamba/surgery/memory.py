"""Memory of large tensors, as glibc and Linux give it best; elsewhere `empty` is `torch.empty`."""

import ctypes
import mmap
from collections.abc import Sequence

import torch

M_MMAP_THRESHOLD = -3  # malloc.h
LIBC = ctypes.CDLL(None)


def return_freed_memory() -> None:
    """
    Let glibc give freed tensors back to the system. By itself it keeps blocks of up to 32 MB for later, and a model of
    64 layers leaves gigabytes of holes between them.
    """
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(M_MMAP_THRESHOLD, 2**20)


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """
    `torch.empty` in pages of 2 MiB where the system has them. A large tensor is written once or twice: the first touch
    of pages of 4 KiB takes ten times as long as converting bfloat16 to what they hold.
    """
    tensor = torch.empty(shape, dtype=dtype)
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and tensor.nbytes >= 2**22:
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - begin
        LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size - size % mmap.PAGESIZE), advice)
    return tensor


def converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)` in the pages of `empty`."""
    return tensor if tensor.dtype == dtype else empty(tensor.shape, dtype).copy_(tensor)
