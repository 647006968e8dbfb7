"""Memory for large results on a CPU, where most of the time of writing into fresh memory goes into its pages.

Smaller ones come from what the process has freed (`backends/heap.py`).
A result's memory is given out again once nobody holds the result, as CUDA's allocator does by itself; the tutorial's
gradients then take half the time. Huge pages would do as well, but on fragmented memory the kernel makes room for them
first, which takes longer than everything else.
"""

import mmap
import sys
from collections import defaultdict
from contextlib import suppress
from math import prod
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from backends.heap import LARGEST
from backends.ops.choice import capturing


def _references(blocks: list[Any]) -> list[int]:
    """Return how many references there are to each, of which some are of the counting itself."""
    return [sys.getrefcount(block) for block in blocks]


(OURS,) = _references([bytearray(1)])
"""References to a block that nobody holds; Python's versions count differently."""


class Pool:
    """Blocks of memory by size. A tensor in a block holds it, so that its reference count says whether it is free."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[mmap.mmap]] = defaultdict(list)
        self._named: dict[str, Tensor] = {}
        _POOLS.add(self)

    def forget(self) -> None:
        """Give back what nobody else holds."""
        self._blocks.clear()
        self._named.clear()

    def same(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return the memory that was returned for the name before, if it fits."""
        if capturing(like):
            return like.new_empty(shape)
        known = self._named.get(name)
        if known is None or (known.shape, known.dtype) != (shape, like.dtype):
            known = self._named[name] = self.empty(shape, like)
        return known

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return memory that nobody else holds, of the dtype and on the device of `like`; its values are arbitrary."""
        size = prod(shape) * like.element_size()
        if like.device.type != "cpu" or size <= LARGEST or capturing(like):
            return like.new_empty(shape)
        return torch.frombuffer(self._block(size), dtype=like.dtype).view(shape)

    def _block(self, size: int) -> mmap.mmap:
        blocks = self._blocks[size]
        for place, count in enumerate(_references(blocks)):
            if count <= OURS:
                return blocks[place]
        self._blocks[size].append(_pages(size))
        return self._blocks[size][-1]


def _pages(size: int) -> mmap.mmap:
    """Return memory of this process alone: by default, one that it forks would write into it too."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows, where nothing is forked
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages


_POOLS: WeakSet[Pool] = WeakSet()


def release() -> None:
    """Give back what pools keep for results to come."""
    for pool in _POOLS:
        pool.forget()
