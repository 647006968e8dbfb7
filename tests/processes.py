"""The command line as a process of its own, and what is left of it."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from testbed.records import Record, read_records

ROOT = Path(__file__).parent.parent
FAILING = ROOT / "tests" / "failing.py"
LONG = 300  # seconds that nothing here should take; only a test that hangs meets it
SMALL = """
model: logistic
data: {random: {shape: [5], classes: 3}}
loss: nll
batch_size: 6
device: cpu
"""


@contextmanager
def program(command: Sequence[str], **options: Any) -> Iterator[Any]:
    """Start a program, its output piped. A block that fails, or takes too long, leaves nothing of it running."""
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    process = subprocess.Popen(command, **settings)
    watchdog = threading.Timer(LONG, kill, [process])  # whoever reads from it, or waits for it, goes on then
    watchdog.start()
    try:
        with process:
            try:
                yield process
            except BaseException:
                kill(process)  # this `with` would wait for it
                raise
    finally:
        watchdog.cancel()


def start(*arguments: object, **environment: str) -> AbstractContextManager[Any]:
    """Start the command line in a process group of its own."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "testbed", *map(str, arguments), "--plugin", str(FAILING)]
    return program(command, cwd=ROOT, env=variables, start_new_session=True)


def kill(process: Any) -> None:
    """Kill a process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        for one in [*family(process), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def wait_for(process: Any, words: str) -> None:
    """Read a process' progress up to the line with these words."""
    assert any(words in line for line in process.stderr)


def family(process: Any) -> list[psutil.Process]:
    """Return all processes that a process has started, and those that they have."""
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes: Iterable[psutil.Process], seconds: float = 30) -> bool:
    """Return whether all processes have ended, or do so soon."""
    end = time.monotonic() + seconds
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def records(folder: Path) -> list[Record]:
    """Return the records of a run."""
    return read_records(folder / "results.jsonl")
