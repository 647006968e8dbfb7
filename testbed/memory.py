"""Peak memory of one call, in a pass of its own."""

import gc
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from backends.heap import give_back
from testbed.timing import synchronise


def peak(function: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Run a function once and return how much memory it took beyond what was held before, as plain data.

    On a CPU it runs in a thread of its own, where glibc begins with an empty heap. In the main thread's, what the call
    frees stays in the holes that earlier calls have left: up to twice of what it holds at a time, by chance. Large
    blocks should be given back when they are freed; see `backends.heap.nothing_kept`.

    Returns:
        `peak_bytes`: on CUDA the peak of what is allocated, above what was before; on a CPU the growth of the resident
        set to its peak (Linux); None where it cannot be measured. On CUDA `reserved_bytes` too, the same of what the
        allocator has taken from the device.
    """
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        reserved = torch.cuda.memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        synchronise(device)
        allocated = torch.cuda.max_memory_allocated(device) - before
        reserved = torch.cuda.max_memory_reserved(device) - reserved
        return {"peak_bytes": allocated, "reserved_bytes": reserved}
    if sys.platform != "linux":
        return {"peak_bytes": None}  # only Linux can reset the high-water mark
    give_back()  # else the next call's pages would not count as growth
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of the resident set
    except OSError:
        return {"peak_bytes": None}  # a container may forbid it
    start = _status("VmRSS")
    _in_a_thread(function)
    return {"peak_bytes": max(0, _status("VmHWM") - start)}


def _in_a_thread(function: Callable[[], object]) -> None:
    """Call a function in a new thread; what it raises escapes, and a Ctrl-C does not wait for it."""
    done: Future[None] = Future()

    def call() -> None:
        try:
            function()
        except BaseException as error:  # SystemExit too: a thread would end of it without a word
            done.set_exception(error)
        else:
            done.set_result(None)

    Thread(target=call, daemon=True).start()
    done.result()


def _status(key: str) -> int:
    """Return one figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
