"""A lack of memory, by whatever exception it is told."""

import gc
import re
from collections.abc import Callable

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


def enough_for(call: Callable[[], object]) -> bool:
    """Run a call, and return whether there was enough memory for it; if not, what it held is let go."""
    try:
        call()
    except (RuntimeError, MemoryError) as error:
        if not lack_of_memory(error):
            raise
    else:
        return True
    gc.collect()  # its frames and its graph, with their tensors, are in cycles with the exception
    return False
