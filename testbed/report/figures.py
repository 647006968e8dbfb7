"""Rows → figures: each with its data as a table, its text for those who cannot see it, and PNG and SVG for a paper."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.report import draw, units
from testbed.report.rows import Places, Row
from testbed.report.verdict import is_backend

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


@dataclass(frozen=True)
class Figure:
    """A figure of one run, problem and quantity.

    Attributes:
        name: Its file's name, without the ending.
        title: What it shows, in a line.
        caption: How to read it.
        alt: What there is to see, in words.
        header: The columns of its data.
        data: The numbers that are drawn, as text.
        render: Draws it.
    """

    name: str
    title: str
    caption: str
    alt: str
    header: tuple[str, ...]
    data: tuple[tuple[str, ...], ...]
    render: Callable[[], "Drawing"]

    def save(self, folder: Path) -> str:
        """Write PNG and SVG, and return the SVG's text."""
        return draw.save(self.render, folder / self.name)


def figures(rows: Sequence[Row]) -> list[Figure]:
    """Return the figures of all runs, problems and quantities that have something to show, in the rows' order."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    colours = draw.colours([row.backend for row in rows if is_backend(row)])
    place, found = Places.of(rows), _side_by_side(rows)
    for i, group in enumerate(groups.values(), start=1):
        shown = _largest_batch(group)
        one, all_sizes = place(shown[0]), place.without("batch")(group[0])
        made = [time(shown, one, colours), scaling(group, all_sizes, colours)]
        made += [errors(shown, one, colours), phases(shown, one)]
        found += [_named(figure, i if len(groups) > 1 else 0, group[0].quantity) for figure in made if figure]
    return found


def _side_by_side(rows: Sequence[Row]) -> list[Figure]:
    """Return a figure of each problem and quantity that several runs have timed."""
    groups: dict[tuple[str, int | None, str], list[Row]] = {}
    for row in rows:
        if row.median is not None and row.status in ("ok", ""):
            groups.setdefault((row.problem, row.batch, row.quantity), []).append(row)
    place, shared = Places.of(rows).without("run"), [g for g in groups.values() if len({r.run for r in g}) > 1]
    made = [runs(group, place(group[0])) for group in shared]
    return [
        _named(f, i if len(made) > 1 else 0, g[0].quantity)
        for i, (f, g) in enumerate(zip(made, shared, strict=True), 1)
    ]


def runs(rows: Sequence[Row], where: str) -> Figure:
    """Return the right backends' times in several runs, side by side."""
    names = list(dict.fromkeys(r.run for r in rows))
    backends: dict[str, list[Row]] = {}
    for row in rows:
        backends.setdefault(row.backend, []).append(row)
    said = [f"{name}: " + ", ".join(f"{units.seconds(r.median)} in {r.run}" for r in b) for name, b in backends.items()]
    data = [(r.backend, r.run, *map(units.seconds, (r.median, r.p5, r.p95)), units.ratio(r.step)) for r in rows]
    return Figure(
        "runs",
        _title("Time of a call, run by run", where),
        "Right results only. Dots: medians; bars: 5th to 95th percentile. The axis is logarithmic. Where the ordinary "
        "step moves as well, it is the machine that differs.",
        f"Median time of a call: {'; '.join(said)}.",
        ("backend", "run", "median", "p5", "p95", "× ordinary step"),
        tuple(data),
        lambda: draw.runs(backends, names),
    )


def time(rows: Sequence[Row], where: str, colours: draw.Colours) -> Figure | None:
    """Return the times of every backend, against the ordinary step and the limit."""
    timed = _sorted(r for r in rows if is_backend(r) and r.median is not None)
    if not timed:
        return None
    missing = [r for r in rows if is_backend(r) and r.median is None]
    lines = {r.backend: r.median for r in rows if not is_backend(r) and r.median is not None}
    said = [f"{r.backend} {units.seconds(r.median)}{_unless_ok(r)}" for r in timed]
    said += [f"{name} {units.seconds(value)}" for name, value in lines.items()]
    said += [f"{r.backend} has no time ({r.status})" for r in missing]
    data = [
        (r.backend, r.status, *map(units.seconds, (r.median, r.p5, r.p95)), units.ratio(r.step) + _interval(r.step_ci))
        for r in [*timed, *missing, *(r for r in rows if not is_backend(r))]
    ]
    return Figure(
        "time",
        _title("Time of a call", where),
        "Dots: medians; bars: 5th to 95th percentile; ticks: every timed call. The axis is logarithmic.",
        f"Median time of a call: {'; '.join(said)}.",
        ("backend", "status", "median", "p5", "p95", "× ordinary step"),
        tuple(data),
        lambda: draw.times(timed, missing, lines, colours),
    )


def scaling(rows: Sequence[Row], where: str, colours: draw.Colours) -> Figure | None:
    """Return time and memory against the batch size; None where there is only one."""
    known = [r for r in rows if r.batch is not None and (not is_backend(r) or r.status == "ok")]
    sizes = sorted({r.batch for r in known if r.batch is not None})
    if len(sizes) < 2:
        return None
    lines: dict[str, list[Row]] = {}
    for row in sorted(known, key=lambda r: r.batch or 0):
        lines.setdefault(row.backend, []).append(row)
    said = []
    for name, points in lines.items():
        timed = [r for r in points if r.median is not None]
        if timed:
            first, last = timed[0], timed[-1]
            times = f"{units.seconds(first.median)} at {first.batch} to {units.seconds(last.median)} at {last.batch}"
            said.append(f"{name} from {times}")
    data = [
        (name, str(r.batch), units.seconds(r.median), units.seconds(_per_sample(r)), units.size(r.peak))
        for name, points in lines.items()
        for r in points
    ]
    return Figure(
        "scaling",
        _title("Time and memory against batch size", where),
        "Medians of right results only, and peak memory beyond what was held before; both axes are logarithmic.",
        f"Time of a call against batch sizes {sizes[0]} to {sizes[-1]}: {'; '.join(said)}.",
        ("backend", "N", "median", "a sample", "peak memory"),
        tuple(data),
        lambda: draw.scaling(lines, colours),
    )


def errors(rows: Sequence[Row], where: str, colours: draw.Colours) -> Figure | None:
    """Return the distribution of the samples' errors, the ill-conditioned ones marked."""
    shown = [r for r in rows if is_backend(r) and (r.errors or r.error is not None)]
    if not shown:
        return None
    said, data = [], []
    for r in shown:
        values = sorted(e for _, e in r.errors)
        middle = values[len(values) // 2] if values else None
        most = values[-1] if values else r.error
        ill = ", ".join(map(str, r.ill_conditioned[:8])) + (", …" if len(r.ill_conditioned) > 8 else "")
        said.append(f"{r.backend} at most {most:.1e}{_unless_ok(r)}" + (f", ill-conditioned: {ill}" if ill else ""))
        data.append((r.backend, r.status, _error(middle), _error(most), str(len(values) or 1), ill or "none"))
    dtype = str(shown[0].record.problem.get("dtype", "")) if shown[0].record else ""
    return Figure(
        "errors",
        _title("Error of each sample" if any(r.errors for r in shown) else "Largest error", where),
        "Distance from the float64 truth, relative to its norm; a dot a sample, crosses: ill-conditioned samples (near "
        "a kink, where a few roundings move the right gradient as far). An exact sample stands on the left edge.",
        f"Relative errors: {'; '.join(said)}.",
        ("backend", "status", "median error", "largest error", "samples", "ill-conditioned samples"),
        tuple(data),
        lambda: draw.errors(shown, dtype, colours),
    )


def phases(rows: Sequence[Row], where: str) -> Figure | None:
    """Return what is paid once (import, prepare, first call) and what every call pays."""
    shown = [r for r in rows if is_backend(r) and len(r.phases) > 1]
    if not shown:
        return None
    names = list(dict.fromkeys(name for r in shown for name in r.phases if name != "steady"))
    names += ["steady"] * any("steady" in r.phases for r in shown)
    said = [f"{r.backend}: " + ", ".join(f"{n} {units.seconds(v)}" for n, v in r.phases.items()) for r in shown]
    data = [(r.backend, *(units.seconds(r.phases.get(name)) for name in names)) for r in shown]
    return Figure(
        "phases",
        _title("What is paid once, and what each call pays", where),
        "Import: of the library, where this process had not imported it yet. Prepare: building the function (copies, "
        "hooks, tracing). First call, and steady: the median of the timed calls. The axis is logarithmic.",
        f"Phases: {'; '.join(said)}.",
        ("backend", *names),
        tuple(data),
        lambda: draw.phases(shown, names),
    )


def _title(what: str, where: str) -> str:
    return f"{what}: {where}" if where else what


def _named(figure: Figure, number: int, quantity: str) -> Figure:
    """Return the figure with a file name of its own."""
    words = "".join(c if c.isalnum() else "-" for c in quantity).strip("-")
    name = "-".join([figure.name, *([f"{number:02d}", words] if number else [])])
    return replace(figure, name=name)


def _largest_batch(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the largest batch size that a backend was right at, else of the largest."""
    right = [r.batch or 0 for r in rows if r.status == "ok"] or [r.batch or 0 for r in rows]
    return [r for r in rows if (r.batch or 0) == max(right)]


def _sorted(rows: Iterable[Row]) -> list[Row]:
    """Return the rows, the right ones first, the cheapest of them on top."""
    return sorted(rows, key=lambda r: (r.status != "ok", r.median or 0.0))


def _per_sample(row: Row) -> float | None:
    return row.median / row.batch if row.median is not None and row.batch else None


def _unless_ok(row: Row) -> str:
    return "" if row.status == "ok" else f" ({row.status})"


def _interval(pair: tuple[float, float] | None) -> str:
    return units.interval(list(pair)) if pair else ""


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"
