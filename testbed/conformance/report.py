"""The conformance matrix as text, made from records alone."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from testbed.conformance.sweep import row
from testbed.records import FAILED, WRONG, Record

WIDTH = 80
KINDS = {"ok": "ok", "unsupported": "refused", "unavailable": "absent"}
KINDS |= dict.fromkeys(WRONG, "wrong") | dict.fromkeys((*FAILED, "interrupted"), "error")


@dataclass(frozen=True)
class Tally:
    """What became of some cells.

    Attributes:
        kinds: How many are ok, refused, wrong, an error, or absent.
        saved: How many of the refused would be wrong, would the backend not refuse.
        silent: How many of those would have the right form, so that only a comparison shows it.
        needless: How many of the refused would be right.
    """

    kinds: Counter[str]
    saved: int
    silent: int
    needless: int

    def __str__(self) -> str:
        """Return it as the matrix shows it: `34`, `30+4r`, `4r`, `2 wrong!`."""
        for kind, text in (("wrong", " wrong!"), ("error", " error"), ("absent", " absent")):
            if self.kinds[kind]:
                return f"{self.kinds[kind]}{text}"
        parts = [str(self.kinds["ok"])] * bool(self.kinds["ok"]) + [f"{self.kinds['refused']}r"] * self.refuses
        return "+".join(parts) or "–"

    @property
    def refuses(self) -> bool:
        """Whether some cells are refused."""
        return bool(self.kinds["refused"])


def unguarded_status(record: Record) -> str:
    """Return what a refused cell's library would have been found to be: "ok", "wrong", or else an empty string."""
    status = record.agreement.get("unguarded", {}).get("status", "")
    return {"ok": "ok", **dict.fromkeys(WRONG, "wrong")}.get(status, "")


def tally(records: Iterable[Record]) -> Tally:
    """Count what became of cells."""
    found = list(records)
    saved = [r for r in found if unguarded_status(r) == "wrong"]
    return Tally(
        Counter(KINDS[r.status] for r in found),
        saved=len(saved),
        silent=sum(bool(r.agreement["unguarded"]["silent"]) for r in saved),
        needless=sum(unguarded_status(r) == "ok" for r in found),
    )


def row_of(record: Record) -> str:
    """Return the row of the matrix that a record belongs to."""
    return row(record.problem["layer"], record.problem["case"])


def columns(records: Sequence[Record]) -> dict[str, list[str]]:
    """Return the columns: backends with options, and those that did the same in every cell and share the column."""
    cells: dict[str, dict[tuple[str, str], str]] = {}
    backend: dict[str, str] = {}
    for r in records:
        cells.setdefault(r.label, {})[r.problem["case"], r.quantity] = str(tally([r]))
        backend[r.label] = r.backend
    found: dict[str, list[str]] = {}
    for label, mine in cells.items():
        same = next((k for k in found if backend[k] == backend[label] and cells[k] == mine), None)
        found.setdefault(same or label, []).append(label)
    return found


def matrix(records: Sequence[Record]) -> list[str]:
    """Return the matrix of one quantity, in blocks of columns that fit `WIDTH`."""
    shared = columns(records)
    rows: dict[str, dict[str, list[Record]]] = {}
    for r in records:
        if r.label in shared:
            rows.setdefault(row_of(r), {}).setdefault(r.label, []).append(r)
    grid = {name: {label: str(tally(found)) for label, found in cells.items()} for name, cells in rows.items()}
    lines: list[str] = []
    for block in _blocks(grid, list(shared)):
        lines += ["", *_table(grid, block)] if lines else _table(grid, block)
    for label, others in shared.items():
        if len(others) > 1:
            lines += ["", *textwrap.wrap(f"{label} stands for {', '.join(others[1:])} too", WIDTH)]
    return lines


def _head(label: str) -> tuple[str, str]:
    """Return a column's two lines: the backend, and the values of its options."""
    name, _, options = label.partition("(")
    return name, ",".join(option.partition("=")[2] for option in options.rstrip(")").split(", ") if option)


def _width(grid: dict[str, dict[str, str]], label: str) -> int:
    return max(len(text) for text in (*_head(label), *(cells.get(label, "") for cells in grid.values())))


def _blocks(grid: dict[str, dict[str, str]], labels: list[str]) -> Iterator[list[str]]:
    """Yield the columns that fit side by side; a row's name is cut, where need be, to a width that tells rows apart."""
    room = WIDTH - min(23, max(map(len, grid)))
    block: list[str] = []
    for label in labels:
        if block and sum(_width(grid, one) + 1 for one in [*block, label]) > room:
            yield block
            block = []
        block.append(label)
    yield block


def _table(grid: dict[str, dict[str, str]], labels: list[str]) -> list[str]:
    widths = {label: _width(grid, label) for label in labels}
    first = min(max(map(len, grid)), WIDTH - sum(w + 1 for w in widths.values()))

    def line(name: str, texts: Iterable[str]) -> str:
        name = name if len(name) <= first else name[: first - 1] + "…"
        cells = (text.rjust(width) for text, width in zip(texts, widths.values(), strict=True))
        return f"{name:<{first}} {' '.join(cells)}".rstrip()

    rule = "─" * (first + sum(w + 1 for w in widths.values()))
    lines = [line("", (_head(label)[i] for label in labels)) for i in (0, 1)]
    body = [line(name, (cells.get(label, "") for label in labels)) for name, cells in grid.items()]
    return [*lines, rule, *body]


COUNTS = "{:<27} {:>6} {:>7} {:>6} {:>7} {:>8} {:>6} {:>6}"


def counts(records: Sequence[Record]) -> list[str]:
    """Return how many cells each backend has of each kind, over all quantities."""
    labels = dict.fromkeys(r.label for r in records)
    lines = [COUNTS.format("", "ok", "refused", "saved", "silent", "needless", "wrong", "error")]
    for label in labels:
        t = tally(r for r in records if r.label == label)
        numbers = (t.kinds["ok"], t.kinds["refused"], t.saved, t.silent, t.needless, t.kinds["wrong"], t.kinds["error"])
        lines.append(COUNTS.format(label[:27], *numbers))
    note = (
        "saved: refused, and the library would return something wrong; silent: of these, something of the right form; "
        "needless: refused, and the library would be right (asked of each backend's own quantities)."
    )
    return [*lines, *textwrap.wrap(note, WIDTH)]


def details(records: Sequence[Record], verbose: bool = False) -> list[str]:
    """Return a paragraph for every cell that is wrong or an error; and for every refused one, if wanted."""
    lines: list[str] = []
    wanted = ("wrong", "error", "refused") if verbose else ("wrong", "error")
    for kind in wanted:
        for r in (r for r in records if KINDS[r.status] == kind):
            more = f" [unguarded: {r.agreement['unguarded']['diagnosis']}]" if unguarded_status(r) == "wrong" else ""
            lines += textwrap.wrap(f"{kind}: {r.label}, {r.quantity}: {r.problem['case']}", WIDTH)
            lines += textwrap.wrap(f"{r.reason}{more}", WIDTH, initial_indent="    ", subsequent_indent="    ")
    return lines


def report(records: Sequence[Record], verbose: bool = False) -> str:
    """Return all of it: a matrix for each quantity that differs from the first, the counts, the wrong cells."""
    quantities = list(dict.fromkeys(r.quantity for r in records))
    lines: list[str] = []
    first: dict[tuple[str, str], str] = {}
    for quantity in quantities:
        mine = [r for r in records if r.quantity == quantity]
        cells = {(r.problem["case"], r.label): KINDS[r.status] for r in mine}
        if first and cells == first:
            lines += [f"{quantity}: as {quantities[0]}, cell by cell"]
        else:
            lines += [f"{quantity} (30+4r: 30 right, 4 refused)", "", *matrix(mine), ""]
        first = first or cells
    return "\n".join([*lines, "", *counts(records), "", *details(records, verbose)]).rstrip()
