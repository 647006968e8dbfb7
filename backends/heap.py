"""What becomes of memory that a process frees on a CPU.

glibc gives some of it back to the kernel, and then the next call of the same function pays for its pages again: a
quarter of the time of the tutorial's training step. Whether it does depends on which sizes have been freed before.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LARGEST = 2**25
"""Bytes up to which glibc can take a block from what has been freed; a larger one is always fresh."""

_NOT_GLIBC = AttributeError, OSError, TypeError  # TypeError on Windows

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h

KEPT = 2 * LARGEST
"""As much as glibc keeps once it has freed a block of the largest size. If it were more, even larger ones might fit."""

SMALL = 2**17
"""Bytes from which blocks are given back at once while nothing shall be kept; what glibc itself begins with."""


def keep_freed() -> None:
    """Let the process keep up to 64 MiB of what it frees, for blocks of up to 32 MiB; see mallopt(3)."""
    _keep(LARGEST, KEPT)


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Keep next to nothing of what is freed in the block; after it, what is freed is kept again.

    A block in use above many that were freed leaves a hole in the heap that the kernel does not get back. Where larger
    results than any that are kept fit into it, they cost no fresh pages: by chance, and half of their time.
    """
    _keep(SMALL, SMALL)
    try:
        yield
    finally:
        give_back()
        keep_freed()


def _keep(block: int, together: int) -> None:
    with suppress(*_NOT_GLIBC):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, block)
        libc.mallopt(_TRIM_THRESHOLD, together)


def give_back() -> None:
    """Give what is free back to the kernel."""
    with suppress(*_NOT_GLIBC):
        ctypes.CDLL(None).malloc_trim(0)
