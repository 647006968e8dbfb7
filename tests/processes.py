"""The command line as a process of its own, and what is left of it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
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


def start(*arguments: object, **environment: str) -> Any:
    """Start the command line in a process group of its own, its output piped."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "testbed", *map(str, arguments), "--plugin", str(FAILING)]
    return subprocess.Popen(
        command, cwd=ROOT, env=variables, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=-1
    )


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
