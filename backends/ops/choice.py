"""What is chosen by measuring: of several ways to the same tensor, the fastest on this device."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TypeAlias

import torch
from torch import Tensor

Way: TypeAlias = Callable[[], Tensor]

CHOSEN: dict[str, str] = {}
"""What has been chosen in this process by measuring and trying, by what it was chosen for; records show it."""

_KERNELS = False  # no ContextVar: on CUDA, autograd runs the backward pass in a thread of its own
_TRACING = False

TRIES = 5  # of each way, in turn: the first one may compile, allocate, or pick a kernel


def fastest(ways: Mapping[str, Way], what: str, samples: int, like: Tensor) -> Tensor:
    """Return the tensor by the way that is fastest for `what`; when that is new, all are tried.

    Args:
        ways: By name. The first one is taken where it cannot be measured: while ops are recorded.
        what: All that the speed of the ways depends on but device, dtype and the number of samples.
        samples: Their number; its power of two is part of what the choice is made for.
        like: Any tensor of the dtype and on the device.
    """
    if len(ways) == 1:
        return next(iter(ways.values()))()
    dtype = str(like.dtype).removeprefix("torch.")
    key = f"{what}, {dtype}, {like.device.type}, {1 << samples.bit_length() - 1} samples or more"
    if CHOSEN.get(key) not in ways:
        if capturing(like):  # warming up, outside of the capture, has chosen
            return next(iter(ways.values()))()
        rounds = [{name: timed(way, like) for name, way in ways.items()} for _ in range(TRIES)]
        seconds = {name: min(r[name] for r in rounds) for name in ways}
        CHOSEN[key] = min(seconds, key=lambda name: seconds[name])
    return ways[CHOSEN[key]]()


@contextmanager
def kernels(wanted: bool) -> Iterator[None]:
    """Measure Triton's kernels too, in the block, if wanted."""
    global _KERNELS
    before, _KERNELS = _KERNELS, wanted
    try:
        yield
    finally:
        _KERNELS = before


def with_kernels(like: Tensor) -> bool:
    """Return whether Triton's kernels, which have no float64, are among the ways."""
    return _KERNELS and like.dtype != torch.float64


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
    """Return how many seconds a way takes; endless where it needs more memory than there is."""
    _wait(like)
    start = time.perf_counter()
    with suppress(torch.OutOfMemoryError):
        way()
        _wait(like)
        return time.perf_counter() - start
    return float("inf")


def _wait(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
