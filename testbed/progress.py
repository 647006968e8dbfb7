"""Progress on stderr: what runs now and how long it will still take; a bar on a terminal, plain lines otherwise.

The time left of a piece of work is from the pace of its steps so far, that of the run from the cells that have ended.
"""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

BAR = 12
OTHERS = BAR + len(" 1000/1000 0:00:00 about 10 min 00 s left  ")
SILENCE_S = 15.0  # after so long without a line, a step gets one

Clock = Callable[[], float]


class Progress(Protocol):
    """Hears what is going on; a bar, plain lines, or nothing."""

    def begin(self, what: str, steps: int, max_s: float | None = None) -> None:
        """Say that a piece of work of so many steps begins; after `max_s` seconds there are no more."""

    def step(self, what: str) -> None:
        """Say that a step begins."""


class Silent:
    """Progress that says nothing."""

    def begin(self, what: str, steps: int, max_s: float | None = None) -> None:
        """Say nothing."""

    def step(self, what: str) -> None:
        """Say nothing."""


class Pace:
    """How fast the steps of a piece of work go.

    Args:
        steps: How many there are; 0 where nobody knows.
        max_s: Seconds after which no more steps begin, if there is such a limit.
        clock: Tells the time in seconds.
    """

    def __init__(self, steps: int, max_s: float | None = None, clock: Clock = time.monotonic) -> None:
        self.steps, self.max_s, self.begun = steps, max_s, 0
        self._clock = clock
        self._start = self._last = clock()

    def step(self) -> None:
        """Note that a step begins; those before it are done."""
        self.begun += 1
        self._last = self._clock()

    def left(self) -> float | None:
        """Return the seconds left, if the coming steps take as long as those so far; None where that says nothing.

        A step that takes longer than those that are done counts among those so far.
        """
        done, more = self.begun - 1, self.steps - self.begun
        if done < 1:
            return None
        taken, now = self._clock() - self._start, self._clock() - self._last
        each = (self._last - self._start) / done
        left = each * (more + 1) - now if now <= each else taken / self.begun * more
        if self.max_s is not None:
            left = min(left, self.max_s - taken)
        return left if left > 0 else None  # it was to have ended by now, or nobody knew how many steps there are

    def __str__(self) -> str:
        """Return the time left in words, or nothing."""
        left = self.left()
        if left is None:
            return ""
        minutes, seconds = divmod(round(left), 60)
        return f"about {f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'} left"


class Lines:
    """A line when a piece of work begins, and for a step where nothing was said for a while."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._start = self._said = clock()
        self._what, self._pace = "", Pace(0, clock=clock)
        self._run = Pace(0, clock=clock)

    def expect(self, cells: int) -> None:
        """Remember how many cells the run has."""
        self._run = _first(Pace(cells, clock=self._clock))

    def ended(self) -> None:
        """Count a cell."""
        self._run.step()

    def begin(self, what: str, steps: int, max_s: float | None = None) -> None:
        """Print what begins, how long the run has taken so far, and how long it may still take."""
        self._what, self._pace = what, Pace(steps, max_s, self._clock)
        left = str(self._run)
        self._say(f"{what} ({self._run.begun - 1} of {self._run.steps} cells done, {left})" if left else what)

    def step(self, what: str) -> None:
        """Print what runs now, if nothing was printed for a while."""
        self._pace.step()
        if self._clock() - self._said > SILENCE_S:
            of = f" ({self._pace.begun} of {self._pace.steps})" if self._pace.steps else ""
            self._say(", ".join(filter(None, (f"{self._what}: {what}{of}", str(self._pace)))))

    def _say(self, text: str) -> None:
        self._said = self._clock()
        print(f"[{self._said - self._start:5.1f} s] {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _first(pace: Pace) -> Pace:
    """Return the pace, its first step begun."""
    pace.step()
    return pace


class _Left(ProgressColumn):
    """The time left, which counts down between steps."""

    def __init__(self, paces: Mapping[TaskID, Pace]) -> None:
        super().__init__()
        self._paces = paces

    def render(self, task: Task) -> Text:
        """Return it in words."""
        return Text(str(self._paces[task.id]))


class Bar:
    """A bar that shows what runs now, and one for the run once a cell has ended; they are gone when the run ends."""

    def __init__(self, console: Console | None = None) -> None:
        self._paces: defaultdict[TaskID, Pace] = defaultdict(lambda: Pace(0))
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=BAR), MofNCompleteColumn())
        self._bars = RichProgress(
            *columns,
            TimeElapsedColumn(),
            _Left(self._paces),
            console=console or Console(stderr=True),
            transient=True,
        )
        self._now = self._bars.add_task("", total=None)
        self._run = self._bars.add_task("cells done", total=None, visible=False)
        self._what = ""

    def expect(self, cells: int) -> None:
        """Remember how many cells the run has."""
        self._paces[self._run] = _first(Pace(cells))
        self._bars.update(self._run, total=cells)

    def ended(self) -> None:
        """Count a cell."""
        self._paces[self._run].step()
        self._bars.update(self._run, advance=1, visible=True)

    def begin(self, what: str, steps: int, max_s: float | None = None) -> None:
        """Start the bar anew for a piece of work."""
        self._what, self._paces[self._now] = what, Pace(steps, max_s)
        self._bars.reset(self._now, description=self._fit(what), total=steps or None)

    def step(self, what: str) -> None:
        """Show what runs now; the steps before it are done."""
        pace = self._paces[self._now]
        self._bars.update(self._now, description=self._fit(f"{what} · {self._what}"), completed=pace.begun)
        pace.step()

    def _fit(self, text: str) -> str:
        """Return a text that leaves the other columns their place on one line."""
        most = max(12, self._bars.console.width - OTHERS)
        return text if len(text) <= most else f"{text[: most - 1]}…"

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()


def progress() -> Lines | Bar:
    """Return what fits stderr; colours are left out where `NO_COLOR` is set."""
    return Bar() if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else Lines()
