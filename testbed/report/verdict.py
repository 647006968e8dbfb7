"""The verdict, first on the page: which backend, how much, is anything wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

from testbed import timing
from testbed.records import FAILED, WRONG
from testbed.report import units
from testbed.report.rows import LIMIT, ORDINARY, Places, Row

KINDS = {
    "wrong": (WRONG, "is wrong", "are wrong"),
    "failed": (FAILED, "failed", "failed"),
    "stopped": (("interrupted",), "was interrupted", "were interrupted"),
    "refused": (("unsupported", "unavailable"), "refused or is not installed", "refused or are not installed"),
}  # kind of trouble: its statuses, and how one or several cells are said to be in it


@dataclass(frozen=True)
class Verdict:
    """What is to be known of one problem, batch size and quantity.

    Attributes:
        title: Which it is.
        best: The cheapest right backend; None where there is none.
        equals: Backends that cannot be told from it.
        text: Who is cheapest, and by how much, in a sentence.
    """

    title: str
    best: Row | None
    equals: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Trouble:
    """Cells that did not end well, of one kind.

    Attributes:
        kind: A key of `KINDS`.
        text: How many, in words.
        cells: (backend and where, status and reason) of each.
    """

    kind: str
    text: str
    cells: tuple[tuple[str, str], ...]


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Return a verdict for each run, problem, batch size and quantity, in the rows' order."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*row.group, row.batch), []).append(row)
    place = Places.of(rows)
    return [_verdict(place(group[0]), group) for group in groups.values()]


def troubles(rows: Sequence[Row]) -> list[Trouble]:
    """Return what is not as it should be, the worst first."""
    found, place = [], Places.of(rows)
    for kind, (statuses, one, many) in KINDS.items():
        bad = [row for row in rows if row.status in statuses]
        if bad:
            cells = tuple(
                (" · ".join(filter(None, (r.backend, place(r)))), f"{r.status}: {r.reason}".rstrip(": ")) for r in bad
            )
            found.append(Trouble(kind, f"{len(bad)} {'cell ' + one if len(bad) == 1 else 'cells ' + many}", cells))
    return found


def headline(found: Sequence[Verdict], rows: Sequence[Row]) -> str:
    """Return the one sentence that stands on top."""
    judged = [v for v in found if v.best]
    if not judged:
        cells = [row for row in rows if is_backend(row)]
        right = sum(row.status == "ok" for row in cells)
        if right:
            return f"{right} of {len(cells)} cells agree with the truth; nothing was timed."
        return "No backend gave a right result that could be timed."
    if len(found) == 1:
        return judged[0].text
    wins: dict[str, int] = {}
    for v in judged:
        assert v.best is not None
        wins[v.best.backend] = wins.get(v.best.backend, 0) + 1
    first, *others = sorted(wins, key=lambda name: -wins[name])
    where = "everywhere" if wins[first] == len(found) else f"in {wins[first]} of {len(found)} comparisons"
    rest = "".join(f"; {name} in {wins[name]}" for name in others)
    if ties := sum(bool(v.equals) for v in judged):
        rest += f"; in {ties} of {len(found)} another is as fast within the noise"
    return f"{first} is the cheapest right backend {where}{_steps(judged, first)}{rest}."


def _steps(judged: Sequence[Verdict], backend: str) -> str:
    """Return what a backend costs where it is the cheapest, in ordinary steps."""
    steps = [v.best.step for v in judged if v.best and v.best.backend == backend and v.best.step is not None]
    if not steps:
        return ""
    low, high = units.ratio(min(steps)), units.ratio(max(steps))
    return f" ({low if low == high else f'{low}–{high}'} ordinary steps)"


def _verdict(title: str, rows: Sequence[Row]) -> Verdict:
    right = [r for r in rows if r.status == "ok" and r.median is not None]
    if not right:
        stopped = any(r.status == "interrupted" for r in rows)
        why = "The run was interrupted before a backend was timed" if stopped else "No backend gave a right result"
        return Verdict(title, None, (), f"{why}.")
    best = min(right, key=lambda r: r.median or 0.0)
    equals = tuple(r.backend for r in right if r is not best and not _slower(r, best))
    return Verdict(title, best, equals, _sentence(best, equals))


def _slower(row: Row, best: Row) -> bool:
    """Return whether a row's time is above the best one's by more than the noise."""
    if not row.samples or not best.samples:
        return True
    floor = row.record.timing.get("floor") if row.record else None
    return timing.verdict(timing.ratio(row.samples, best.samples), floor or 0.0) == "slower"


def _sentence(best: Row, equals: Sequence[str]) -> str:
    text = f"{best.backend} is the cheapest right backend: {units.seconds(best.median)}"
    if best.step is not None:
        text += f", {units.ratio(best.step)} ordinary steps"
    if best.ratio and best.ratio_ci and best.verdict != "baseline":
        low, high = best.ratio_ci
        text += f"; {units.ratio(1 / best.ratio)} times as fast as {best.baseline}"
        text += units.interval([1 / high, 1 / low])
        if best.verdict != "faster":
            text += ", which may be noise"
    if equals:
        text += f". {', '.join(equals)}: no difference beyond the noise"
    return text + "."


def is_backend(row: Row) -> bool:
    """Return whether a row is a cell, and no reference line."""
    return row.backend not in (ORDINARY, LIMIT)
