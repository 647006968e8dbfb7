"""Progress on stderr: a bar on a terminal, plain lines otherwise."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Lines:
    """A line when a piece of work begins; steps are not shown."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def begin(self, what: str, steps: int) -> None:
        """Print what begins, and how long the run has taken so far."""
        print(f"[{time.monotonic() - self._start:5.1f} s] {what}", file=sys.stderr, flush=True)

    def step(self, what: str) -> None:
        """Print nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Bar:
    """One bar that shows what runs now; it is gone when the run ends."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=None)
        self._what = ""
        self._steps = 0

    def begin(self, what: str, steps: int) -> None:
        """Start the bar anew for a piece of work."""
        self._what, self._steps = what, 0
        self._bar.reset(self._task, description=what, total=steps)

    def step(self, what: str) -> None:
        """Show what runs now; the steps before it are done."""
        self._bar.update(self._task, description=f"{self._what}: {what}", completed=self._steps)
        self._steps += 1

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def progress() -> Lines | Bar:
    """Return what fits stderr."""
    return Bar() if sys.stderr.isatty() else Lines()
