"""Progress: the time left, the lines on a pipe, the bar on a terminal."""

import io

import pytest
from rich.console import Console

from testbed import progress
from testbed.progress import SILENCE_S, Bar, Lines, Pace


class Clock:
    """A clock that a test turns."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def after(steps: int, seconds: list[float], max_s: float | None = None) -> tuple[Pace, Clock]:
    """Return the pace when the next step begins, after steps that took so long."""
    clock = Clock()
    pace = Pace(steps, max_s, clock)
    pace.step()
    for duration in seconds:
        clock.wait(duration)
        pace.step()
    return pace, clock


def test_time_left_is_that_of_the_steps_so_far() -> None:
    pace, _ = after(10, [2.0, 4.0])
    assert pace.left() == 24
    assert str(pace) == "about 24 s left"


def test_time_left_counts_down_until_a_step_takes_longer_than_those_before() -> None:
    pace, clock = after(4, [2.0, 2.0])
    clock.wait(1)
    assert pace.left() == 3
    clock.wait(1)
    assert pace.left() == 2
    clock.wait(3)
    assert pace.left() == 3


def test_of_a_last_step_that_takes_longer_nobody_knows_how_long() -> None:
    pace, clock = after(3, [2.0, 2.0])
    clock.wait(1.5)
    assert str(pace) == "about 0 s left"
    clock.wait(1)
    assert str(pace) == ""


def test_no_more_time_is_left_than_may_be_spent() -> None:
    pace, clock = after(100, [2.0], max_s=20)
    assert pace.left() == 18
    clock.wait(18.5)
    assert str(pace) == ""


def test_minutes() -> None:
    assert str(after(100, [10.0])[0]) == "about 16 min 30 s left"


@pytest.mark.parametrize(("steps", "seconds"), [(10, []), (0, [1.0]), (1, [1.0])])
def test_says_nothing_that_it_cannot_know(steps: int, seconds: list[float]) -> None:
    assert str(after(steps, seconds)[0]) == ""


def test_lines_are_few_but_no_silence_is_long(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = Lines(clock)
    lines.begin("grads: timing", 5)
    for i in range(4):
        lines.step(f"round {i + 1}")
        clock.wait(0.4 * SILENCE_S)
    assert capsys.readouterr().err == (
        "[  0.0 s] grads: timing\n[ 18.0 s] grads: timing: round 4 (4 of 5), about 12 s left\n"
    )


def test_lines_say_how_much_of_the_run_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = Lines(clock)
    lines.expect(6)
    lines.begin("problem 1 of 3", 0)
    clock.wait(5)
    lines.ended()
    clock.wait(5)
    lines.ended()
    lines.begin("problem 2 of 3", 0)
    assert capsys.readouterr().err == (
        "[  0.0 s] problem 1 of 3\n[ 10.0 s] problem 2 of 3 (2 of 6 cells done, about 20 s left)\n"
    )


def test_bar_of_the_run_comes_with_the_first_cell_that_ends() -> None:
    out = io.StringIO()
    with Bar(Console(file=out, force_terminal=True, width=100)) as bar:
        bar.expect(2)
        bar.begin("grads: timing", 3)
        bar.step("round 1")
        bar._bars.refresh()
        assert "cells done" not in out.getvalue()
        bar.ended()
    assert "cells done" in out.getvalue()
    assert "1/2" in out.getvalue()


def test_bar_shows_what_runs() -> None:
    out = io.StringIO()
    with Bar(Console(file=out, force_terminal=True, width=100)) as bar:
        bar.begin("grads: timing", 3)
        bar.step("round [1]")
        bar.step("round [2]")
    assert "round [2] · grads: timing" in out.getvalue()
    assert "about 0 s left" in out.getvalue()


def test_bar_stays_on_its_line() -> None:
    out = io.StringIO()
    with Bar(Console(file=out, force_terminal=True, width=80)) as bar:
        bar.begin("problem", 3)
        bar.step("a")
        bar.step("does every sample have a gradient of its own, and if not, who is to blame?")
    assert "about 0 s left" in out.getvalue()


@pytest.mark.parametrize(
    ("terminal", "name", "kind"), [(False, "xterm", Lines), (True, "dumb", Lines), (True, "xterm", Bar)]
)
def test_fits_stderr(terminal: bool, name: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", name)
    assert isinstance(progress.progress(), kind)


def test_no_colour_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    with Bar(Console(file=out, force_terminal=True, width=100)) as bar:
        bar.begin("grads", 2)
        bar.step("vmap")
    assert "\x1b[3" not in out.getvalue()
