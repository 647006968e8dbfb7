"""Timing that can be trusted: synchronised, interleaved in shuffled rounds, with an interval on every ratio.

Nothing here knows backends or YAML: what is timed are functions of no arguments, by name.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

RESAMPLES = 2000
ENOUGH = 10  # rounds before an interval is trusted to say that there are enough: from fewer it is too narrow
CONFIDENCE = 0.95


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Sample:
    """One timed call.

    Attributes:
        seconds: On CUDA between two events on the device; on a CPU by the clock.
        host: Seconds until the call returned; near `seconds` on CUDA means that launching is what takes the time.
    """

    seconds: float
    host: float


def time_once(function: Callable[[], object], device: torch.device) -> Sample:
    """Time one call; what it returns is freed outside the timed region."""
    synchronise(device)
    if device.type != "cuda":
        start = time.perf_counter()
        result = function()
        seconds = time.perf_counter() - start
        del result
        return Sample(seconds, seconds)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):  # events are the current one's
        begin.record()
        start = time.perf_counter()
        result = function()
        host = time.perf_counter() - start
        end.record()
    synchronise(device)
    del result
    return Sample(begin.elapsed_time(end) / 1e3, host)


def rounds(names: Sequence[str], count: int, max_s: float, seed: int) -> Iterator[list[str]]:
    """Yield `count` rounds, each all names in a new order; fewer, but at least two, once `max_s` seconds are spent."""
    order, start = random.Random(seed), time.monotonic()
    for done in range(count):
        if done >= 2 and time.monotonic() - start > max_s:
            return
        shuffled = list(names)
        order.shuffle(shuffled)
        yield shuffled


@dataclass(frozen=True)
class Ratio:
    """A ratio of two median times, with its bootstrap confidence interval."""

    value: float
    low: float
    high: float


def ratio(samples: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Return median(samples) / median(baseline) with its interval, resampling rounds (both were timed in each)."""
    n = min(len(samples), len(baseline))
    a, b = np.asarray(samples[:n]), np.asarray(baseline[:n])
    index = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    resampled = np.median(a[index], axis=1) / np.median(b[index], axis=1)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))


def precise(samples: Mapping[str, Sequence[Sample]], baseline: str, precision: float) -> bool:
    """Return whether the interval of every ratio to the baseline is narrow enough for no more rounds to be needed.

    Args:
        samples: Of each name, one a round.
        baseline: The name that ratios are taken to.
        precision: Half the width of an interval, relative to the ratio, that is narrow enough; 0 never is.
    """
    base = samples[baseline]
    if not precision or len(base) < ENOUGH:
        return False
    found = [relative(mine, base) for name, mine in samples.items() if name != baseline and mine]
    return all(r.high - r.low <= 2 * precision * r.value for r in found)


def floor_of(against_itself: Ratio) -> float:
    """Return the A/A floor: how far from 1 (as |log|) the baseline seems to be from itself."""
    return max(abs(math.log(against_itself.low)), abs(math.log(against_itself.high)))


def verdict(found: Ratio, floor: float) -> str:
    """Return "faster" or "slower" where the interval excludes 1 by more than the A/A floor, else "can't tell"."""
    if math.log(found.high) < -floor:
        return "faster"
    return "slower" if math.log(found.low) > floor else "can't tell"


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return median, spread and raw samples as plain data for a record; outliers are counted, not removed."""
    seconds = np.asarray([s.seconds for s in samples])
    p5, q1, median, q3, p95 = np.quantile(seconds, [0.05, 0.25, 0.5, 0.75, 0.95])
    outliers = int((np.abs(seconds - median) > 3 * (q3 - q1)).sum()) if len(seconds) >= 8 else 0
    host = float(np.median([s.host for s in samples]))
    return {
        "median_s": float(median),
        "p5_s": float(p5),
        "p95_s": float(p95),
        "host_s": host,
        "samples_s": seconds.tolist(),
        "outliers": outliers,
    }


def relative(samples: Sequence[Sample], baseline: Sequence[Sample]) -> Ratio:
    """Return the ratio of two sets of timed calls."""
    return ratio([s.seconds for s in samples], [s.seconds for s in baseline])


@dataclass(frozen=True)
class Limit:
    """The physical limit of a quantity on a device.

    Attributes:
        flops: Floating-point operations of one ordinary step, which every way has to do.
        bytes: Bytes that must be written for the result.
        peak_flops: The most operations a second that a matrix product reached here.
        bandwidth: The most bytes a second that filling memory reached here.
        seconds: max(flops / peak_flops, bytes / bandwidth).
    """

    flops: int
    bytes: int
    peak_flops: float
    bandwidth: float
    seconds: float

    def plain(self) -> dict[str, Any]:
        """Return the limit as plain data for a record."""
        return asdict(self)


def ceilings(device: torch.device, dtype: torch.dtype, size: int = 0) -> tuple[float, float]:
    """Measure the device's ceilings: (FLOP/s of a square matrix product in `dtype`, bytes/s of filling memory)."""
    n = size or (8192 if device.type == "cuda" else 1536)
    generator = torch.Generator(device).manual_seed(0)  # not the global one, which is the caller's
    a = torch.randn(n, n, device=device, dtype=torch.float32, generator=generator).to(dtype)
    out = torch.empty(32 * n * n // 4, device=device, dtype=torch.float32)
    products = [time_once(lambda: a @ a, device).seconds for _ in range(5)]
    fills = [time_once(lambda: out.fill_(1.0), device).seconds for _ in range(5)]
    return 2 * n**3 / min(products), out.numel() * out.element_size() / min(fills)


def limit(flops: int, written: int, peak: float, bandwidth: float) -> Limit:
    """Return the limit for so many operations and bytes on a device with these ceilings."""
    return Limit(flops, written, peak, bandwidth, max(flops / peak, written / bandwidth))
