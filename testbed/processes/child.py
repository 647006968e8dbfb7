"""A host in a process of its own: what it does to itself, or does not do in time, ends a step and nothing else.

The standard library's `multiprocessing` does the work. Pebble's process pool was tried and is not used: it calls
`os._exit(0)` a time-out, starts a new worker at once, in the middle of another's timing, and tells neither the process
nor what it wrote.
"""

import atexit
import multiprocessing
import os
import pickle
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any, NoReturn

import psutil
import torch

from testbed import cgroup
from testbed.attempt import Attempt
from testbed.cell import Cell
from testbed.outcome import Outcome
from testbed.processes import autopsy
from testbed.processes.host import Failed, Setup
from testbed.processes.output import FLOOD, Output
from testbed.processes.serving import BYTES, serve
from testbed.processes.shield import held_back
from testbed.timing import Sample

STARTUP_S = 300.0  # to import PyTorch and plug-ins on a machine that is busy; no step is charged for it
CLOSING_S = 1.0  # between the end of a process' pipe and its own end
FREE = 0.9  # of the memory that is free, for one child: the rest of the system goes on
CPU = torch.device("cpu")
PRELOADED = ["testbed.processes.serving", "torch._dynamo"]  # the compiler: `torch.func` and optimizers load it
WORDS = {
    "make": "making the problem",
    "check": "looking whether the problem has per-sample gradients",
    "begin": "preparing the quantity",
    "truth": "computing the truth",
    "start": "preparing, the first call and its check",
    "time": "a timed call",
    "finish": "memory and the last check",
    "attempt": "making the batch, preparing and two calls",
}


@dataclass(frozen=True)
class Isolation:
    """What children may take, and what they load before anything else.

    Attributes:
        timeout_s: Seconds for a step.
        memory_gb: GB of the device's memory; no limit if None.
        plugins: Files that register what cells and problems name.
        device: Where they compute.
    """

    timeout_s: float = 600.0
    memory_gb: float | None = None
    plugins: tuple[str, ...] = ()
    device: torch.device = CPU


def on_device(isolation: Isolation, device: torch.device) -> Isolation:
    """Return the isolation on a device; a CPU's limit is nine tenths of the free memory, if none was given."""
    isolation = replace(isolation, device=device)
    if isolation.memory_gb is not None or device.type != "cpu":
        return isolation
    memory = psutil.virtual_memory()
    free, _ = cgroup.memory(memory.available, memory.total)
    return replace(isolation, memory_gb=round(FREE * free / BYTES, 1))


def starter(device: torch.device) -> SpawnContext | ForkServerContext:
    """Return what starts processes that compute on a device.

    To import PyTorch takes seconds. So one process does, computes nothing, and forks all others; but for CUDA, which no
    fork survives if anything before it has touched a GPU, and where there is no fork (Windows), each does for itself.
    """
    if device.type == "cuda" or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    return _forks()


@cache
def _forks() -> ForkServerContext:
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(PRELOADED)
    with held_back():
        forkserver.ensure_running()
    first = forks.Process(target=int)  # begins once all is imported; a Ctrl-C until then is heard at once
    first.start()
    first.join()
    return forks


class Child:
    """The steps of `testbed.processes.host.Steps`, taken by a child process that lives until it fails or is closed."""

    def __init__(self, setup: Setup, isolation: Isolation) -> None:
        self._isolation = isolation
        processes = starter(isolation.device)
        self._pipe, theirs = processes.Pipe()
        reader, writer = processes.Pipe(duplex=False)
        self._oom_kills = autopsy.oom_kills()
        about = pickle.dumps((setup, torch.get_num_threads(), isolation.memory_gb, isolation.device))
        self._process = processes.Process(target=serve, args=(theirs, writer, isolation.plugins, about))
        try:
            with held_back():  # until it is in a group of its own, it would die of a Ctrl-C with many words
                self._process.start()
                _living.add(self)
        except KeyboardInterrupt:
            if self._process.pid is not None:  # it has begun
                self._process.kill()  # nobody has it yet who would
            raise
        theirs.close()
        writer.close()
        self._output = Output(reader, self.kill)
        self._ready = False

    @property
    def pid(self) -> int:
        """The process' number."""
        return self._process.pid or 0

    def settle(self) -> None:
        """Wait until the process has started; it may raise `Failed`, as every step may."""
        if not self._ready:
            self._receive("starting the process", STARTUP_S, "")
            self._ready = True

    def make(self) -> dict[str, Any]:
        """See `Steps`."""
        return self._ask("make")  # type: ignore[no-any-return]

    def check(self) -> None:
        """See `Steps`."""
        self._ask("check")

    def begin(self, quantity: str, options: Mapping[str, Any]) -> None:
        """See `Steps`."""
        self._ask("begin", quantity, options)

    def truth(self, fresh: bool) -> None:
        """See `Steps`."""
        self._ask("truth", fresh)

    def start(self, cell: Cell) -> Outcome:
        """See `Steps`."""
        return self._named(self._ask("start", cell))

    def again(self, cell: Cell, name: str) -> None:
        """See `Steps`."""
        self._ask("again", cell, name)

    def bounds(self) -> dict[str, Any]:
        """See `Steps`."""
        return self._ask("bounds")  # type: ignore[no-any-return]

    def time(self, name: str) -> Sample:
        """See `Steps`."""
        return self._ask("time", name)  # type: ignore[no-any-return]

    def finish(self, cell: Cell, outcome: Outcome) -> Outcome:
        """See `Steps`."""
        return self._named(self._ask("finish", cell, outcome))

    def attempt(self, cell: Cell | None) -> Attempt:
        """See `Host`."""
        return self._ask("attempt", cell)  # type: ignore[no-any-return]

    def kill(self) -> None:
        """End the process, and every process that it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # its own group, but for its first moments
        self._process.kill()

    def close(self) -> None:
        """End the process and wait until it is gone."""
        self.kill()
        self._process.join()
        self._pipe.close()
        self._output.close()
        _living.discard(self)

    def _ask(self, step: str, *arguments: object) -> Any:  # noqa: ANN401  whatever the step returns
        self.settle()
        self._output.begin()
        try:
            self._pipe.send((step, arguments))
        except OSError:
            raise self._ended() from None
        return self._receive(WORDS.get(step, step), self._isolation.timeout_s, " (limits.timeout_s)")

    def _receive(self, doing: str, timeout: float, which: str) -> Any:  # noqa: ANN401  whatever the step returns
        if not wait([self._pipe, self._process.sentinel], timeout):
            self.close()
            reason = f"{doing} took longer than {timeout:g} s{which}"
            raise Failed("timeout", reason + self._output.last_words(), self._output.tail)
        try:
            value, error = self._pipe.recv() if self._pipe.poll() else _no_answer()
        except Exception:
            raise self._ended() from None
        if isinstance(error, Failed) and error.status == "oom":
            raise Failed("oom", self._with_limit(error.reason), error.details)
        if error is not None:
            raise error
        return value

    def _ended(self) -> Failed:
        """Return how the process has come to its end."""
        self._process.join(CLOSING_S)
        code = self._process.exitcode
        self.close()
        said = self._output.tail
        if self._output.flooded:
            reason = f"wrote more than {FLOOD // 2**20} MiB to its output in one step"
            return Failed("error", reason + self._output.last_words(), said)
        status, reason = autopsy.cause(code, said, autopsy.oom_kills() > self._oom_kills)
        reason = self._with_limit(reason) if status == "oom" else reason
        return Failed(status, reason, said)

    def _named(self, outcome: Outcome) -> Outcome:
        """Return an outcome whose lack of memory names the limit."""
        if outcome.status == "oom":
            outcome.reason = self._with_limit(outcome.reason)
        return outcome

    def _with_limit(self, reason: str) -> str:
        limit, on_gpu = self._isolation.memory_gb, self._isolation.device.type == "cuda"
        return f"{reason} (limits.memory_gb: {limit:g})" if limit and ("CUDA" in reason) == on_gpu else reason


_living: set[Child] = set()


@atexit.register  # runs before what `multiprocessing`, imported earlier, has registered: that waits for every child
def _leave_none() -> None:
    """End the children that nobody closes: a Ctrl-C came between their start and whoever would have."""
    for child in list(_living):
        if child._process.is_alive():
            child.kill()


def _no_answer() -> NoReturn:
    raise EOFError
