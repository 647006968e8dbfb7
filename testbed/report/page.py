"""Runs → `report.html`: one offline file with the verdict, the table and the figures, made from records alone."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from backends.base import first_line
from testbed.environment import flat
from testbed.records import Record
from testbed.report import columns, draw, units
from testbed.report.figures import Figure, figures
from testbed.report.notes import notes
from testbed.report.published import comparisons, heading
from testbed.report.rows import Places, Row, device_of, rows_of
from testbed.report.runs import Run, run_of
from testbed.report.verdict import Trouble, headline, is_backend, troubles, verdicts

GOOD = "Nothing is wrong: every backend that ran agrees with the truth."


@dataclass(frozen=True)
class Cell:
    """A cell of the page's table.

    Attributes:
        text: What is shown.
        key: What it is sorted by; empty where there is no value, which comes last.
    """

    text: str
    key: str


@dataclass(frozen=True)
class Line:
    """A line of the page's table."""

    cells: tuple[Cell, ...]
    status: str
    reason: str


@dataclass(frozen=True)
class Shown:
    """A figure and its drawing."""

    figure: Figure
    svg: Markup


def write_page(records: Iterable[Record], folder: Path) -> Path:
    """Write the page of one run, and its figures, into the run's folder.

    Returns:
        The page's path, `folder/report.html`; the figures are in `folder/figures`, as PNG and SVG.
    """
    return write_pages([run_of(list(records), folder)], folder)


def draw_page(records: Iterable[Record], folder: Path) -> None:
    """Write the page of a run that has just ended, and say where it is; a page that fails does not fail the run."""
    records = list(records)
    if not records:
        return
    try:
        page = write_page(records, folder)
    except Exception as error:  # of the disk, of matplotlib, of ours: the records are what counts, and they are safe
        print(
            f"no report: {type(error).__name__}: {first_line(error)}; `python -m testbed report {folder}` tries again"
        )
    else:
        print(f"report in {page}")


def write_pages(runs: Sequence[Run], folder: Path) -> Path:
    """Write one page of several runs side by side, and its figures, into a folder; it is made where it is missing."""
    rows = [row for run in runs for row in rows_of(run)]
    pictures = folder / "figures"
    pictures.mkdir(parents=True, exist_ok=True)
    for old in [*pictures.glob("*.png"), *pictures.glob("*.svg")]:
        old.unlink()  # of a page that was made when fewer cells were there
    shown = [Shown(figure, _inline(figure.save(pictures), figure)) for figure in figures(rows)]
    page = folder / "report.html"
    page.write_text(render(runs, rows, shown), encoding="utf-8")
    return page


def render(runs: Sequence[Run], rows: Sequence[Row], shown: Sequence[Shown]) -> str:
    """Return the page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("testbed.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["median"] = _median
    found, seen = verdicts(rows), columns.visible(rows)
    return environment.get_template("page.html").render(
        title=", ".join(dict.fromkeys(_title(run) for run in runs)),
        runs=runs,
        places=[_place(run) for run in runs],
        headline=headline(found, rows),
        verdicts=found,
        troubles=troubles(rows),
        verdict_words=_summary(rows, troubles(rows)),
        columns=seen,
        choices=_choices(rows, seen),
        lines=[_line(row, seen) for row in rows],
        where=Places.of(rows).shared(rows[0]),
        side_by_side=side_by_side(runs, rows),
        notes=_notes(rows),
        published=_published(runs),
        figures=shown,
        settings=settings(runs),
    )


def side_by_side(runs: Sequence[Run], rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Row]]]:
    """Return {place: {backend: {run: row}}} of what more than one run has; empty where there is one run only."""
    place, found = Places.of(rows).without("run"), defaultdict[str, dict[str, dict[str, Row]]](dict)
    if len(runs) > 1:
        for row in rows:
            found[place(row)].setdefault(row.backend, {})[row.run] = row
    return {
        name: backends
        for name, backends in found.items()
        if len({run for by_run in backends.values() for run in by_run}) > 1
    }


def settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return {setting: its value in each run}: machine, versions, commit."""
    found = [flat(run.records[0].environment, ("backend_source", "disturbances")) for run in runs]
    return {key: [one.get(key, "–") for one in found] for key in dict.fromkeys(key for one in found for key in one)}


def _median(row: Row) -> str:
    """Return a row's time in the table of runs side by side; a cell that is not right says what it is."""
    if row.status not in ("ok", "") or row.median is None:
        return row.status or "–"
    return units.seconds(row.median) + (f" · {units.ratio(row.step)}×" if row.step is not None else "")


def _title(run: Run) -> str:
    return run.records[0].experiment or run.name


def _place(run: Run) -> str:
    """Return what a run was made on and with, in a line."""
    record = run.records[0]
    torch, commit = record.environment.get("versions", {}).get("torch"), record.environment.get("commit")
    dirty = " with changes" if record.environment.get("dirty") else ""
    words = [
        run.name,
        device_of(record),
        f"torch {torch}" if torch else "",
        f"commit {commit[:7]}{dirty}" if commit else "",
    ]
    return " · ".join(filter(None, words))


def _summary(rows: Sequence[Row], found: Sequence[Trouble]) -> str:
    """Return whether anything is wrong, in a sentence."""
    serious = [t.text for t in found if t.kind in ("wrong", "failed")]
    if serious:
        return "; ".join(serious) + "."
    if any(t.kind == "stopped" for t in found):
        return "The run was interrupted: it is partial. Nothing that ended is wrong."
    return GOOD if any(row.status == "ok" for row in rows) else "No backend ran to its end."


def _line(row: Row, seen: Sequence[columns.Column]) -> Line:
    def cell(column: columns.Column) -> Cell:
        value = column.value(row)
        return Cell(column.text(row), "" if value is None else str(value))

    return Line(tuple(map(cell, seen)), row.status or "line", row.reason)


def _choices(rows: Sequence[Row], seen: Sequence[columns.Column]) -> dict[int, list[str]]:
    """Return {column: its values} of columns that hold a few words, to choose one."""
    found = {}
    for i, column in enumerate(seen):
        values = list(dict.fromkeys(column.text(row) for row in rows if is_backend(row)))
        if column.key != "backend" and column.key != "agrees" and (column.words or column.key == columns.BATCH.key):
            found[i] = [value for value in values if value]
    return {i: values for i, values in found.items() if 1 < len(values) <= 40}


def _notes(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return {place: what the table cannot say}."""
    place, groups = Places.of(rows), defaultdict[str, list[Record]](list)
    for row in rows:
        if row.record:
            groups[place(row)].append(row.record)
    said = {name: notes(records) for name, records in groups.items()}
    return {name: found for name, found in said.items() if found}


def _published(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return {heading: what publications say, and what was measured here of the same}; of several runs with names."""
    return {
        f"{run.name}: {heading(run.size)}" if len(runs) > 1 else heading(run.size): said
        for run in runs
        if (said := list(comparisons(run.published, run.records)))
    }


def _inline(svg: str, figure: Figure) -> Markup:
    """Return an SVG for the page: named for those who cannot see it, and in the page's own text colour."""
    text = svg[svg.index("<svg") :].replace(draw.INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(width|height)="[\d.]+pt" ', "", text, count=2)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{figure.name}-", text)  # ids are the page's, not the figure's
    opening = Markup('<svg role="img" aria-label="{}"').format(figure.alt)
    return Markup(text.replace("<svg", opening, 1))
