"""What is chosen by measuring: of several ways to the same tensor, the fastest on this device."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import inf
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from backends import precision
from backends.graphs import ahead
from backends.refusals import first_line
from backends.shortage import enough_for

Way: TypeAlias = Callable[[], Tensor]
Paths: TypeAlias = Way | tuple[Way, ...]
Kernels: TypeAlias = Literal["checked", "all", "none"]

CHOSEN: dict[str, str] = {}
"""What has been chosen in this process by measuring and trying, by what it was chosen for; records show it."""

_RANKED: dict[tuple[str, torch.device], list[str]] = {}
"""The names of all ways that were measured, the fastest first: not every one can be had while ops are recorded."""

_KERNELS: Kernels = "none"  # no ContextVar: on CUDA, autograd runs the backward pass in a thread of its own
_TRACING = False
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as by Triton

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

AMONG: dict[Kernels, str] = {"checked": "", "all": ", unchecked kernels too", "none": ", without kernels"}

COMPARED = 2**26  # bytes of what a kernel makes, at either end: there may be no room for all of it a second time
CYCLES = 2e9  # of a GPU in a second, or fewer
HELD_BACK = 0.02  # seconds at most: a first call may compile
TRIES = 5  # of each way, in turn
WARM = 2  # of them for all ways: the first one may compile, allocate, or pick a kernel
CLEARLY = 1.25  # times as long as the fastest so far: then the others need not be tried


def fastest(
    ways: Mapping[str, Way],
    what: str,
    samples: int,
    like: Tensor,
    kernels: Mapping[str, Paths] | None = None,
    unchecked: Mapping[str, Paths] | None = None,
) -> Tensor:
    """Return the tensor by the way that is fastest for `what`; when that is new, all are tried.

    Args:
        ways: By name. The first one is taken where it cannot be measured: while ops are recorded.
        what: All that the speed of the ways depends on but device, dtype and the number of samples.
        samples: Their number; its power of two is part of what the choice is made for.
        like: Any tensor of the dtype and on the device.
        kernels: Ways by Triton's kernels, which are tried too where they are wanted. One that does not run (there is no
            compiler, the GPU has too little of something), or not to the same tensor, is never the fastest. The first
            path is the way; others are what it does for values that may come later, and have to agree too.
        unchecked: Kernels that no GPU of ours has run yet, which are tried only where all are wanted: a wrong number is
            noticed here, but one that reads or writes out of bounds would end the process.
    """
    if with_kernels(like):
        first = next(iter(ways.values()))
        offered = {**(kernels or {}), **((unchecked or {}) if _KERNELS == "all" else {})}
        ways = {**ways, **{name: _Kernel.of(paths, first) for name, paths in offered.items()}}
    return ways[fastest_name(ways, what, samples, like)]()


def fastest_name(ways: Mapping[str, Callable[[], object]], what: str, samples: int, like: Tensor) -> str:
    """Return which way is fastest; see `fastest`."""
    if len(ways) == 1:
        return next(iter(ways))
    dtype = "TF32" if precision.tf32_allowed(like) else str(like.dtype).removeprefix("torch.")
    key = f"{what}, {dtype}, {like.device.type}, {1 << samples.bit_length() - 1} samples or more"
    key += ", in a CUDA graph" if ahead() else ""  # where launches cost next to nothing
    key += among if (among := AMONG[_KERNELS]) and _run_kernels(like.device) else ""
    known = [name for name in _RANKED.get((key, like.device), ()) if name in ways]
    if len(known) < len(ways):
        if capturing(like):  # warming up, outside of the capture, has chosen
            return (known or list(ways))[0]
        for way in ways.values():
            if isinstance(way, _Kernel):
                way.compare(like)
        seconds = dict.fromkeys(ways, inf)
        for tries in range(1, TRIES + 1):
            for name, way in ways.items():
                if tries <= WARM or seconds[name] <= CLEARLY * min(seconds.values()):
                    seconds[name] = min(seconds[name], timed(way, like))
        _RANKED[key, like.device] = known = sorted(ways, key=lambda name: seconds[name])
        CHOSEN[key] = known[0]
        for name, way in ways.items():
            if isinstance(way, _Kernel) and way.failure:
                CHOSEN[key] += f" ({name} {way.failure})"
    return known[0]


@dataclass
class _Kernel:
    """A way by a Triton kernel, with its other paths, another way to the same tensor, and what the kernel fails in."""

    paths: tuple[Way, ...]
    other: Way
    failure: str = ""

    @classmethod
    def of(cls, paths: Paths, other: Way) -> "_Kernel":
        return cls(paths if isinstance(paths, tuple) else (paths,), other)

    def __call__(self) -> Tensor:
        return self.paths[0]()

    def compare(self, like: Tensor) -> None:
        """Find out whether the kernel runs, to the same tensor: no GPU is like the one on which it was written.

        What is looked for is a wrong number, not a rounding: half of the digits shall be the same.
        """
        eps = 2**-10 if precision.tf32_allowed(like) else torch.finfo(like.dtype).eps

        def run() -> None:
            right = _ends(self.other()).clone()  # both ways may write to the same memory
            finite = right.isfinite()
            for path in self.paths:
                found = _ends(path())
                gap, whole = (t.where(finite, 0).float().norm().item() for t in (found - right, right))
                if not gap <= eps**0.5 * whole:
                    self.failure = f"is off by {gap:.1e} where the norm is {whole:.1e}"

        try:
            if not enough_for(run):
                self.failure = "needs more memory than there is to be compared"
        except Exception as error:
            self.failure = f"does not run: {first_line(error)}"


def _ends(t: Tensor) -> Tensor:
    """Return the first and the last samples of a tensor [N, ...], if all would take much memory beside it."""
    few = max(1, COMPARED // max(1, t[0].nbytes))
    return t if len(t) <= 2 * few else torch.cat([t[:few], t[-few:]])


@contextmanager
def kernels(wanted: Kernels) -> Iterator[None]:
    """Measure those of Triton's kernels too, in the block, where they run."""
    global _KERNELS
    before, _KERNELS = _KERNELS, wanted
    try:
        yield
    finally:
        _KERNELS = before


def with_kernels(like: Tensor) -> bool:
    """Return whether Triton's kernels, which have no float64, are among the ways."""
    return _KERNELS != "none" and not _TRACING and like.dtype in KERNEL_DTYPES and _run_kernels(like.device)


def _run_kernels(device: torch.device) -> bool:
    return _compiles(device) if device.type == "cuda" else _INTERPRETED


@cache
def _compiles(device: torch.device) -> bool:
    """Return whether a GPU has the instructions that the kernels were measured with, and Triton is installed."""
    new_enough = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    return new_enough and find_spec("triton") is not None


@contextmanager
def tracing() -> Iterator[None]:
    """Say that ops are being recorded in the block: nothing is then chosen by values or time, nor kept."""
    global _TRACING
    _TRACING = True
    try:
        yield
    finally:
        _TRACING = False


def capturing(like: Tensor) -> bool:
    """Return whether ops are being recorded, also as a CUDA graph, which must not wait for a value."""
    return _TRACING or (like.is_cuda and torch.cuda.is_current_stream_capturing())


def timed(way: Callable[[], object], like: Tensor) -> float:
    """Return how many seconds a way takes; endless where it needs more memory than there is, or its kernel fails."""
    if isinstance(way, _Kernel) and way.failure:
        return inf
    if like.is_cuda and ahead():
        return _on_device(way, like)
    _wait(like)
    start = time.perf_counter()

    def run() -> None:
        way()
        _wait(like)

    return time.perf_counter() - start if enough_for(run) else inf


def _on_device(way: Callable[[], object], like: Tensor) -> float:
    """Return how many seconds a way takes the device, which is held back until the host has launched all of it."""
    found = [inf]

    def run() -> None:
        begun = time.perf_counter()
        way()
        host = time.perf_counter() - begun
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(CYCLES * min(2 * host, HELD_BACK)))
        start.record()
        way()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000)

    with torch.cuda.device_of(like):
        enough_for(run)
    return found[-1]


def _wait(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
