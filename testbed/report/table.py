"""Records → tables with notes and a summary, as text and as HTML."""

import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from testbed.experiment import Published
from testbed.records import Record
from testbed.report import summary, units
from testbed.report.notes import ill_conditioned, notes
from testbed.report.published import comparisons, heading
from testbed.report.titles import titles

ALIGN_LEFT = ("backend", "status", "way", "quantity", "N", "cheapest", "next")  # columns that are words


@dataclass(frozen=True)
class Table:
    """One problem and quantity, or the summary of several.

    Attributes:
        problem: What the tables of one problem have in common, in a line.
        title: What it is about besides, such as the quantity.
        header: The columns' names.
        rows: The cells' text, as many as the header in each.
        notes: What the table cannot say, in plain words.
    """

    problem: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


class Report:
    """The records of a run, printable as a table and shown as HTML in a notebook.

    Attributes:
        records: The records, in the order their cells ended.
        published: What publications say of such cells.
        size: The size of the experiment that was run, where it has several.
    """

    def __init__(self, records: Iterable[Record], published: Sequence[Published] = (), size: str | None = None) -> None:
        self.records, self.published, self.size = list(records), published, size

    def tables(self) -> list[Table]:
        """Return a table for each problem and quantity, those of a problem next to each other."""
        problems = _grouped(self.records, lambda r: str(r.problem))
        own = self._titles()[1]
        return [
            _table(title, group)
            for title, mine in zip(own, problems, strict=True)
            for group in _grouped(mine, lambda r: r.quantity)
        ]

    def shared(self) -> str:
        """Return what all problems have in common, in a line; empty where there is one."""
        return self._titles()[0]

    def summary(self) -> list[Table]:
        """Return who wins where: a table for all problems that differ in the batch size only; none for one table."""
        if len({(str(r.problem), r.quantity) for r in self.records}) < 2:
            return []
        baseline = next((str(r.timing["baseline"]) for r in self.records if r.timing.get("baseline")), "baseline")
        families = _grouped(self.records, lambda r: str({**r.problem, "batch_size": 0}))
        _, own = titles([family[0] for family in families], but={"batch_size"})
        return [_summary(title, family, baseline) for title, family in zip(own, families, strict=True)]

    def _titles(self) -> tuple[str, list[str]]:
        return titles([group[0] for group in _grouped(self.records, lambda r: str(r.problem))])

    def __str__(self) -> str:
        """Return the tables as text, 80 columns wide."""
        out = io.StringIO()
        self.print(Console(file=out, width=80, no_color=True, force_terminal=False))
        return out.getvalue().rstrip()

    def print(self, console: Console) -> None:
        """Print the tables on a console, in its width; what several have in common is said once."""
        tables = self.tables()
        if shared := self.shared():
            console.print(Text(f"All problems: {shared}\n", style="bold"))
        for problem, group in groupby(tables, key=lambda table: table.problem):
            mine = list(group)
            common = [note for note in mine[0].notes if len(mine) > 1 and all(note in table.notes for table in mine)]
            if len(mine) > 1:
                console.print(Text(f"{problem}\n", style="bold"))
                _print_notes(console, common)
            for table in mine:
                console.print(Text(table.title if len(mine) > 1 else f"{table.title} · {problem}", style="bold"))
                console.print(_grid(table, console.width), "")
                _print_notes(console, [note for note in table.notes if note not in common])
        if found := self.summary():
            console.print(Text("Who wins where", style="bold"))
            console.print(f"{summary.EXPLANATION}\n")
            for table in found:
                console.print(Text(table.problem, style="bold"))
                console.print(_grid(table, console.width), "")
            _print_notes(console, list(dict.fromkeys(note for table in found for note in table.notes)))
        if self.published:
            console.print(Text(heading(self.size), style="bold"))
            _print_notes(console, list(comparisons(self.published, self.records)))

    def _repr_html_(self) -> str:
        """Return the tables as HTML, as notebooks show them."""
        shared = self.shared()
        head = f"<p>{html.escape(shared)}</p>\n" if shared else ""
        return head + "\n".join(_html(table) for table in [*self.tables(), *self.summary()])


def _grouped(records: Iterable[Record], key: Callable[[Record], str]) -> list[list[Record]]:
    """Return the records by a key, in the order in which its values come first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.values())


def _table(problem: str, records: Sequence[Record]) -> Table:
    baseline = next((r.timing["baseline"] for r in records if r.timing.get("baseline")), None)
    header = ("backend", "status", "way", "median", f"× {baseline}", "× step", "peak", "first")
    rows = [_row(r) for r in sorted(records, key=lambda r: r.status != "ok")]
    if step := next((r.timing["ordinary"] for r in records if r.timing.get("ordinary")), None):
        rows.append(("ordinary step", "", "", _median(step), "", "1", "", ""))
        if bound := next((r.timing["limit"] for r in records if r.timing.get("limit")), None):
            share = units.ratio(bound["seconds"] / step["median_s"])
            rows.append(("limit", "", "", units.seconds(bound["seconds"]), "", share, "", ""))
    lines = [header, *rows] if baseline else [line[:4] + line[5:] for line in (header, *rows)]
    return Table(problem, records[0].quantity, lines[0], tuple(lines[1:]), tuple(notes(records)))


def _summary(problem: str, records: Sequence[Record], baseline: str) -> Table:
    rows = tuple(summary.rows(summary.wins(records, baseline)))
    return Table(problem, "who wins where", (*summary.HEADER, baseline), rows, tuple(summary.notes(rows)))


def _width(table: Table) -> int:
    columns = zip(table.header, *table.rows, strict=True)
    return sum(max(map(len, column)) + 2 for column in columns)


def _grid(table: Table, width: int) -> RichTable:
    """Return the table for a terminal; where it is too wide, options, spreads, intervals have lines of their own."""
    stacked = _width(table) > width
    grid = RichTable(box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False, show_edge=False)
    for i, column in enumerate(table.header):
        left = column in ALIGN_LEFT
        words = column in ("cheapest", "next")  # may be wrapped at spaces
        keep = not stacked or (i > 0 and not words)
        grid.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=keep)
    for row in table.rows:
        texts = (_stacked(text) if stacked else text for text in row)
        grid.add_row(*(Text(text) for text in texts))
    return grid


def _stacked(text: str) -> str:
    """Return a cell in several lines: `opacus(mode=ew)` as `opacus` and ` mode=ew`, intervals below their numbers."""
    name, bracket, options = text.partition("(")
    if bracket and options.endswith(")"):
        text = "\n ".join([name, *options[:-1].split(", ")])
    return text.replace(" ±", "\n±").replace(" [", "\n[")


def _print_notes(console: Console, found: Sequence[str]) -> None:
    for note in found:
        console.print(Text(f"• {note}"))
    if found:
        console.print()


def _row(r: Record) -> tuple[str, ...]:
    t = r.timing
    against = "1" if t.get("verdict") == "baseline" else units.ratio(t.get("ratio")) + units.interval(t.get("ratio_ci"))
    step = t.get("ordinary") or {}
    return (
        r.label,
        _status(r),
        "native" if t.get("native") else "derived",
        _median(t),
        against,
        units.ratio(step.get("ratio")),
        units.size(r.memory.get("peak_bytes")),
        units.seconds(r.phases.get("first_call_s")),
    )


def _status(r: Record) -> str:
    if r.status != "ok":
        return r.status
    if r.agreement.get("rule") == "calibrated" and "same_function" not in r.agreement:
        return "ok ?"  # question 1 was not asked; a note says why
    return "ok *" if ill_conditioned(r) else "ok"


def _median(timing: dict[str, float]) -> str:
    if "median_s" not in timing:
        return "–"
    median = timing["median_s"]
    return f"{units.seconds(median)} {units.spread(median, timing['p5_s'], timing['p95_s'])}"


def _html(table: Table) -> str:
    def line(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in table.rows)
    under = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    caption = " · ".join(part for part in (table.title, table.problem) if part)
    head = f"<caption>{html.escape(caption)}</caption><thead>{line('th', table.header)}</thead>"
    return f"<table>{head}<tbody>{body}</tbody></table><ul>{under}</ul>"
