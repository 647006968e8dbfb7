"""What disturbed a measurement: other programs, a clock that moved, a device that throttled. Each is a sentence."""

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch

from testbed import nvml
from testbed.nvml import SILENT

BUSY = 0.15  # cores that others may use unnoticed: what a quiet system does by itself
BUSY_SHARE = 0.02  # of all cores, where there are many
STOLEN = 0.01  # share of the time that a hypervisor may take unnoticed
MOVED = 0.10  # relative change of a clock that is not noticed
REASONS = {  # nvmlClocksEventReasons: why a GPU is slower than it could be
    0x04: "its power limit",
    0x08: "a hardware slowdown",
    0x20: "its temperature",
    0x40: "its temperature (hardware)",
    0x80: "the power supply",
}


@dataclass
class Clock:
    """The lowest and the highest frequency seen, in MHz."""

    name: str
    seen: list[float] = field(default_factory=list)

    def sentences(self) -> Iterator[str]:
        """Say that it moved, where it did."""
        seen = [mhz for mhz in self.seen if mhz > 0]
        if seen and max(seen) > min(seen) * (1 + MOVED):
            yield f"the {self.name}'s clock moved between {min(seen):.0f} and {max(seen):.0f} MHz"


class Watch:
    """Looks at the machine while something is timed.

    Args:
        device: What is measured on.
        pids: Processes that are our own, this one included.
    """

    def __init__(self, device: torch.device, pids: Iterable[int]) -> None:
        self._own = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        self._cpu = Clock("CPU")
        self._gpu = _Gpu(device, {p.pid for p in self._own}) if device.type == "cuda" else None
        self._seconds: dict[int, float] = {}  # that each of our own has used; kept of one that has ended
        self._start, self._busy, self._mine = time.monotonic(), psutil.cpu_times(), self._used()
        self._throttled = _throttle_count()

    def look(self) -> None:
        """Look at what changes from moment to moment; between rounds, so that nothing timed is disturbed by it."""
        self._used()
        with suppress(OSError, NotImplementedError, AttributeError):
            if (found := psutil.cpu_freq()) is not None:
                self._cpu.seen.append(found.current)
        if self._gpu:
            self._gpu.look()

    def sentences(self) -> list[str]:
        """Return what has disturbed the measurement since the watch began."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        now = psutil.cpu_times()
        found = [
            *others(busy(now) - busy(self._busy), self._used() - self._mine, elapsed, psutil.cpu_count() or 1),
            *stolen(getattr(now, "steal", 0.0) - getattr(self._busy, "steal", 0.0), elapsed, psutil.cpu_count() or 1),
            *self._cpu.sentences(),
            *(self._gpu.sentences() if self._gpu else ()),
        ]
        if (count := _throttle_count() - self._throttled) > 0:
            found.append(f"the CPU throttled {count} times for its temperature")
        return found

    def _used(self) -> float:
        """Return the seconds of processor time that our own processes have used."""
        for process in self._own:
            with suppress(psutil.Error):
                self._seconds[process.pid] = sum(process.cpu_times()[:4])  # user, system, and both of ended children
        return sum(self._seconds.values())


def busy(times: Any) -> float:  # noqa: ANN401  psutil's own type differs from system to system
    """Return the seconds in which processors did something, for whomever on this machine."""
    return float(sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq")))


def others(all_busy: float, own: float, elapsed: float, cores: int) -> Iterator[str]:
    """Say how many cores other programs used, where it is more than a quiet system does."""
    used = (all_busy - own) / elapsed
    if used > max(BUSY, BUSY_SHARE * cores):
        yield f"other programs used {used:.1f} of {cores} cores"


def stolen(seconds: float, elapsed: float, cores: int) -> Iterator[str]:
    """Say how much of the processors' time the hypervisor gave to other machines."""
    share = seconds / elapsed / cores
    if share > STOLEN:
        yield f"the hypervisor took {100 * share:.0f} % of the processors' time"


def _throttle_count() -> int:
    """Return how often cores were slowed down for their temperature; 0 where the system does not say."""
    total = 0
    for file in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count"):
        with suppress(OSError, ValueError):
            total += int(file.read_text())
    return total


class _Gpu:
    """One GPU, seen through NVML; says nothing where NVML says nothing."""

    def __init__(self, device: torch.device, own: set[int]) -> None:
        self._own, self._clock = own, Clock("GPU")
        self._reasons, self._others = 0, set[int]()
        with suppress(*SILENT):
            self._handle = nvml.handle(device)
        self.look()

    def look(self) -> None:
        with suppress(*SILENT):
            self._clock.seen.append(pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM))
            self._reasons |= pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
            running = {p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)}
            self._others |= {pid for pid in running - self._own if psutil.pid_exists(pid)}

    def sentences(self) -> Iterator[str]:
        yield from self._clock.sentences()
        yield from throttled(self._reasons)
        if self._others:
            yield f"other processes used the GPU: {', '.join(map(str, sorted(self._others)))}"


def throttled(reasons: int) -> Iterator[str]:
    """Say why a GPU was slowed down, from NVML's bits."""
    if why := [text for bit, text in REASONS.items() if reasons & bit]:
        yield f"the GPU was slowed down by {', '.join(why)}"
