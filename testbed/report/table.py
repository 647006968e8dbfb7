"""Records → tables with notes and a summary, as text and as HTML."""

import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console
from rich.text import Text

from testbed.config.experiment import Published
from testbed.records import Record
from testbed.report import summary, units
from testbed.report.notes import ill_conditioned, notes
from testbed.report.published import comparisons, heading
from testbed.report.terminal import print_table
from testbed.report.titles import Titles, titles

WAYS = {True: "native", False: "derived", None: "–"}
ALIGN_LEFT = ("backend", "status", "way", "quantity", "N", "cheapest", "next")  # columns that are words


@dataclass(frozen=True)
class Table:
    """One problem and quantity, or the summary of several.

    Attributes:
        title: What it is about, in a line that can stand alone.
        header: The columns' names.
        rows: The cells' text, as many as the header in each.
        notes: What the table cannot say, in plain words.
        problem: Of the title, what the problem has of its own among the problems of the report.
        quantity: Of the title, the quantity with its options.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    problem: str = ""
    quantity: str = ""


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
        named = self._titles()
        return [
            _table(own, whole, group)
            for own, whole, mine in zip(named.own, named.whole, problems, strict=True)
            for group in _grouped(mine, lambda r: r.quantity)
        ]

    def shared(self) -> str:
        """Return what all problems have in common, in a line; empty where there is one."""
        return self._titles().shared

    def summary(self) -> list[Table]:
        """Return who wins where: a table for all problems that differ in the batch size only; none for one table."""
        if len({(str(r.problem), r.quantity) for r in self.records}) < 2:
            return []
        baseline = next((str(r.timing["baseline"]) for r in self.records if r.timing.get("baseline")), "baseline")
        families = _grouped(self.records, lambda r: str({**r.problem, "batch_size": 0}))
        own = titles([family[0] for family in families], but={"batch_size"}).own
        return [_summary(title, family, baseline) for title, family in zip(own, families, strict=True)]

    def _titles(self) -> Titles:
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
                title = table.quantity if len(mine) > 1 else f"{table.quantity} · {problem}"
                console.print(Text(title, style="bold"))
                _print_table(table, console)
                _print_notes(console, [note for note in table.notes if note not in common])
        if found := self.summary():
            console.print(Text("Who wins where", style="bold"))
            console.print(f"{summary.EXPLANATION}\n")
            for table in found:
                console.print(Text(table.problem, style="bold"))
                _print_table(table, console)
            signs = dict.fromkeys(note for table in found for note in table.notes if note != summary.EXPLANATION)
            _print_notes(console, list(signs))
        if self.published:
            console.print(Text(heading(self.size), style="bold"))
            _print_notes(console, list(comparisons(self.published, self.records)))

    def _repr_html_(self) -> str:
        """Return the tables as HTML, as notebooks show them."""
        return "\n".join(_html(table) for table in [*self.tables(), *self.summary()])


def _grouped(records: Iterable[Record], key: Callable[[Record], str]) -> list[list[Record]]:
    """Return the records by a key, in the order in which its values come first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.values())


def _table(own: str, whole: str, records: Sequence[Record]) -> Table:
    baseline = next((r.timing["baseline"] for r in records if r.timing.get("baseline")), None)
    header = ("backend", "status", "way", "median", f"× {baseline}", "× step", "peak", "first")
    rows = [_row(r) for r in sorted(records, key=lambda r: r.status != "ok")]
    if step := next((r.timing["ordinary"] for r in records if r.timing.get("ordinary")), None):
        rows.append(("ordinary step", "", "", _median(step), "", "1", units.size(step.get("peak_bytes")), ""))
        if bound := next((r.timing["limit"] for r in records if r.timing.get("limit")), None):
            share = units.ratio(bound["seconds"] / step["median_s"])
            rows.append(("limit", "", "", units.seconds(bound["seconds"]), "", share, "", ""))
    lines = [header, *rows] if baseline else [line[:4] + line[5:] for line in (header, *rows)]
    quantity = records[0].quantity
    return Table(f"{quantity} · {whole}", lines[0], tuple(lines[1:]), tuple(notes(records)), own, quantity)


def _summary(problem: str, records: Sequence[Record], baseline: str) -> Table:
    rows = tuple(summary.rows(summary.wins(records, baseline)))
    said = (summary.EXPLANATION, *summary.notes(rows))
    return Table(f"Who wins where · {problem}", (*summary.HEADER, baseline), rows, said, problem)


def _width(table: Table) -> int:
    columns = zip(table.header, *table.rows, strict=True)
    return sum(max(map(len, column)) + 2 for column in columns)


def _print_table(table: Table, console: Console) -> None:
    """Print a table; where it is too wide, options, spreads and intervals have lines of their own."""
    stacked = _width(table) > console.width
    ratio = [name for name in table.header if name.startswith("× ") and name != "× step"]
    print_table(
        console,
        table.header,
        [[_stacked(text) if stacked else text for text in row] for row in table.rows],
        left=ALIGN_LEFT,
        fold=table.header[:1] if stacked else (),
        words=("cheapest", "next"),
        drop=("way", "first", "peak", *ratio, "× step") if table.header[0] == "backend" else table.header[:2:-1],
    )
    console.print()


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
        WAYS[t.get("native")],
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
    low, high = timing.get("p5_s", median), timing.get("p95_s", median)
    return f"{units.seconds(median)} {units.spread(median, low, high)}"


def _html(table: Table) -> str:
    def line(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in table.rows)
    under = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    head = f"<caption>{html.escape(table.title)}</caption><thead>{line('th', table.header)}</thead>"
    return f"<table>{head}<tbody>{body}</tbody></table><ul>{under}</ul>"
