"""The machine as the doctor sees it: files, commands, and what psutil tells. Tests put another one in its place."""

import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil

from testbed.cgroup import read_file

WATCHED_S = 1.0  # how long the processor is watched


@dataclass(frozen=True)
class Load:
    """What the processor did while it was watched, and the memory's state.

    Attributes:
        average: Programs that wanted to run, over the last minute.
        busy: Share of all processors that was in use, 0 to 1.
        stolen: Share that the hypervisor gave to others, 0 to 1.
        busiest: (name, share of one processor) of the programs that used most, the largest first.
        memory: (available, total) bytes.
        swap: (used, total) bytes.
    """

    average: float
    busy: float
    stolen: float
    busiest: tuple[tuple[str, float], ...]
    memory: tuple[int, int]
    swap: tuple[int, int]


class Machine:
    """This machine."""

    def read(self, path: str) -> str | None:
        """Return a file's text, stripped; None where it cannot be read."""
        text = read_file(path)
        return None if text is None else text.strip()

    def read_all(self, pattern: str) -> list[str]:
        """Return the texts of the files that match a pattern below `/`."""
        texts = (self.read(str(path)) for path in sorted(Path("/").glob(pattern.removeprefix("/"))))
        return [text for text in texts if text is not None]

    def run(self, *command: str) -> str | None:
        """Return what a command prints; None where it is missing or fails."""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout

    @property
    def variables(self) -> Mapping[str, str]:
        """The environment's variables."""
        return os.environ

    @property
    def processors(self) -> tuple[int, int, int]:
        """Processors that this process may use, processors, and physical cores."""
        logical = psutil.cpu_count() or 1
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
        return usable, logical, psutil.cpu_count(logical=False) or logical

    @property
    def threads(self) -> int:
        """Threads that PyTorch uses for one operation."""
        import torch

        return torch.get_num_threads()

    @property
    def gpus_of_torch(self) -> int:
        """GPUs that PyTorch can use."""
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0

    @cached_property
    def load(self) -> Load:
        """The load; it is watched for a second."""
        programs = [p for p in psutil.process_iter(["name"]) if p.pid != os.getpid()]
        for program in programs:
            _used(program)  # the first answer is the start of the next one's time
        psutil.cpu_times_percent()
        psutil.cpu_percent()
        time.sleep(WATCHED_S)
        shares = ((str(p.info["name"]), _used(p) / 100) for p in programs)
        memory, swap = psutil.virtual_memory(), psutil.swap_memory()
        return Load(
            average=psutil.getloadavg()[0],
            busy=psutil.cpu_percent() / 100,
            stolen=getattr(psutil.cpu_times_percent(), "steal", 0.0) / 100,
            busiest=tuple(sorted((s for s in shares if s[1] > 0.1), key=lambda s: -s[1])[:3]),
            memory=(memory.available, memory.total),
            swap=(swap.used, swap.total),
        )


def _used(program: psutil.Process) -> float:
    """Return the percent of a processor that a program used since the last time; 0 where it has ended."""
    try:
        return float(program.cpu_percent())
    except psutil.Error:
        return 0.0
