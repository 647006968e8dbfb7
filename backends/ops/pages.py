"""Memory for large results. On a CPU most of the time of writing into fresh memory goes into its pages, one by one."""

import mmap
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

LARGE = 2**25  # bytes; below, the allocator gives memory again that it has had before


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return fresh memory of the dtype and on the device of `like`; on Linux in huge pages where it is large."""
    size = prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)  # the tensor keeps the memory
