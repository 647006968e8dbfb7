"""Records → tables with notes, as text and as HTML."""

import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from testbed.environment import device_name
from testbed.records import Record
from testbed.report import units
from testbed.report.notes import ill_conditioned, notes

ALIGN_LEFT = 3  # the first columns are words


@dataclass(frozen=True)
class Table:
    """One problem and quantity.

    Attributes:
        title: Problem, quantity and device in a line.
        header: The columns' names.
        rows: The cells' text, as many as the header in each.
        notes: What the table cannot say, in plain words.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


class Report:
    """The records of a run, printable as a table and shown as HTML in a notebook.

    Attributes:
        records: The records, in the order their cells ended.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)

    def tables(self) -> list[Table]:
        """Return a table for each problem and quantity."""
        groups: dict[tuple[str, str], list[Record]] = {}
        for record in self.records:
            groups.setdefault((str(record.problem), record.quantity), []).append(record)
        return [_table(group) for group in groups.values()]

    def __str__(self) -> str:
        """Return the tables as text, 80 columns wide."""
        out = io.StringIO()
        self.print(Console(file=out, width=80, no_color=True, force_terminal=False))
        return out.getvalue().rstrip()

    def print(self, console: Console) -> None:
        """Print the tables on a console, in its width."""
        for table in self.tables():
            console.print(Text(table.title, style="bold"))
            console.print(_grid(table, stacked=_width(table) > console.width))
            console.print()
            for note in table.notes:
                console.print(Text(f"• {note}"))
            console.print()

    def _repr_html_(self) -> str:
        """Return the tables as HTML, as notebooks show them."""
        return "\n".join(_html(table) for table in self.tables())


def _table(records: Sequence[Record]) -> Table:
    first = records[0]
    baseline = next((r.timing["baseline"] for r in records if r.timing.get("baseline")), "baseline")
    header = ("backend", "status", "agrees", "median", f"× {baseline}", "× step", "peak", "first")
    rows = [_row(r) for r in sorted(records, key=lambda r: r.status != "ok")]
    if step := next((r.timing["ordinary"] for r in records if r.timing.get("ordinary")), None):
        rows.append(("ordinary step", "", "", _median(step), "", "1", "", ""))
        if bound := next((r.timing["limit"] for r in records if r.timing.get("limit")), None):
            share = units.ratio(bound["seconds"] / step["median_s"])
            rows.append(("limit", "", "", units.seconds(bound["seconds"]), "", share, "", ""))
    return Table(_title(first), header, tuple(rows), tuple(notes(records)))


def _width(table: Table) -> int:
    columns = zip(table.header, *table.rows, strict=True)
    return sum(max(map(len, column)) + 2 for column in columns)


def _grid(table: Table, stacked: bool) -> RichTable:
    """Return the table for a terminal; where it is too wide, spreads and intervals go below their numbers."""
    grid = RichTable(box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False, show_edge=False)
    for i, column in enumerate(table.header):
        left = i < ALIGN_LEFT
        grid.add_column(column, justify="left" if left else "right", overflow="fold", no_wrap=i > 0 or not stacked)
    for row in table.rows:
        texts = (text.replace(" ±", "\n±").replace(" [", "\n[") if stacked else text for text in row)
        grid.add_row(*(Text(text) for text in texts))
    return grid


def _row(r: Record) -> tuple[str, ...]:
    t = r.timing
    against = "1" if t.get("verdict") == "baseline" else units.ratio(t.get("ratio")) + units.interval(t.get("ratio_ci"))
    step = t.get("ordinary") or {}
    return (
        r.label + ("" if not t.get("native") or r.quantity == "grads" else " *"),
        r.status,
        _agreement(r),
        _median(t),
        against,
        units.ratio(step.get("ratio")),
        units.size(r.memory.get("peak_bytes")),
        units.seconds(r.phases.get("first_call_s")),
    )


def _agreement(r: Record) -> str:
    if r.status == "interrupted" and r.agreement.get("precision", {}).get("agrees"):
        return "yes"  # so far
    if r.status != "ok":
        return "no" if r.diagnosis else "–"
    if r.agreement.get("rule") == "calibrated" and "same_function" not in r.agreement:
        return "yes ?"  # question 1 was not asked; a note says why
    return "yes *" if ill_conditioned(r) else "yes"


def _median(timing: dict[str, float]) -> str:
    if "median_s" not in timing:
        return "–"
    median = timing["median_s"]
    low, high = timing.get("p5_s", median), timing.get("p95_s", median)
    return f"{units.seconds(median)} {units.spread(median, low, high)}"


def _title(r: Record) -> str:
    p = r.problem
    train = f", trained {p['train_steps']} steps" if p.get("train_steps") else ""
    what = ", ".join(str(p[key]) for key in ("model", "data", "loss") if p.get(key))
    n, dtype = p.get("batch_size", "?"), p.get("dtype", "?")  # a record of an earlier version may lack them
    return f"{r.quantity} · {what}{train} · N={n}, {dtype} · {device_name(r.environment)}"


def _html(table: Table) -> str:
    def line(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in table.rows)
    under = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    head = f"<caption>{html.escape(table.title)}</caption><thead>{line('th', table.header)}</thead>"
    return f"<table>{head}<tbody>{body}</tbody></table><ul>{under}</ul>"
