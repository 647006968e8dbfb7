"""A lack of memory, by whatever exception it is told."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

NO_MEMORY = re.compile(
    "can't allocate memory|CUDA error: out of memory"
    "|STATUS_ALLOC_FAILED"  # cuBLAS, cuDNN
    "|could not execute a primitive"  # oneDNN says no more than that when its scratch memory cannot be had
)


def lack_of_memory(error: BaseException | None) -> BaseException | None:
    """Return the lack of memory that an exception is, or was raised from; None where there is none.

    On a CPU PyTorch raises a RuntimeError like any other, which a backend may take for its library's refusal.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or NO_MEMORY.search(str(error)):
            return error
        error = error.__cause__
    return None


@contextmanager
def going_on_without_memory() -> Iterator[None]:
    """Go on after the block when there was not enough memory for it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lack_of_memory(error):
            raise
