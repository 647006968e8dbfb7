"""How the figures look: readable in one column of a paper and on a phone, for the colour-blind, on light and on dark.

Everything that is text or axis is drawn in `INK`; the page lets it follow its own text colour.
"""

import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from testbed.report import units
from testbed.report.rows import LIMIT, ORDINARY, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

Colours: TypeAlias = Mapping[str, tuple[str, str]]
"""{backend: (colour, marker)}"""

INK = "#16181d"  # no colour of the palette: the page finds it by its name
GREY = "#8a8f98"
# Okabe and Ito's palette for the colour-blind, without black and yellow, which vanish on one of the two backgrounds
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
LINES = {ORDINARY: "--", LIMIT: ":"}
WIDTH = 4.2  # inches: at a column's 3.4 its text is of 7.7 points, on a phone of 10 pixels
ENDS = {"oom": "x", "timeout": "|", "--most": ">"}  # what a search for the largest batch ended by; all else: "*"
LINES_A_ROW = 2  # of text that a row of a figure has room for
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "none",  # text stays text: small, searchable, and it follows the page's colour
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def colours(backends: Iterable[str]) -> Colours:
    """Return a colour and a marker for each backend, the same in all figures of a page."""
    names = dict.fromkeys(backends)
    return {
        name: (PALETTE[i % len(PALETTE)], MARKERS[i // len(PALETTE) % len(MARKERS)]) for i, name in enumerate(names)
    }


def save(render: Callable[[], "Figure"], path: Path) -> str:
    """Draw a figure, write it as PNG and SVG, and return the SVG's text."""
    import matplotlib as mpl  # a second to import, and only drawing needs it

    text = io.StringIO()
    salted = {**STYLE, "svg.hashsalt": path.name}  # ids that do not change from run to run
    with mpl.rc_context(salted), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name in letters that the font lacks: the browser has them
        figure = render()
        figure.savefig(path.with_name(f"{path.name}.png"), dpi=220, facecolor="white")
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    path.with_name(f"{path.name}.svg").write_text(text.getvalue(), encoding="utf-8")
    return text.getvalue()


def times(rows: Sequence[Row], missing: Sequence[Row], lines: Mapping[str, float], colours: Colours) -> "Figure":
    """Draw times as dots with bars, one row a backend, the cheapest on top."""
    figure, (axes,) = _figure(len(rows) + len(missing))
    for y, row in enumerate(rows):
        colour, marker = _look(row, colours)
        assert row.median is not None
        axes.plot(row.samples, [y] * len(row.samples), "|", color=colour, ms=9, alpha=0.35, mew=0.8)
        axes.plot([row.p5 or row.median, row.p95 or row.median], [y, y], color=colour, lw=2.2, solid_capstyle="round")
        axes.plot([row.median], [y], marker, color=colour, ms=6.5)
        note = units.seconds(row.median) if row.status == "ok" else row.status
        _beside(axes, y, note, grey=row.status != "ok")
    for y, row in enumerate(missing, start=len(rows)):
        _beside(axes, y, row.status, grey=True)
    for name, seconds in lines.items():
        label = f"{name}, {units.seconds(seconds)}"
        axes.axvline(seconds, color=INK, lw=1.1, ls=LINES[name], label=label, zorder=0.5)
    _log(axes, "x", [t for r in rows for t in (r.p5, r.p95, *r.samples) if t] + list(lines.values()), units.seconds)
    _names(axes, [*rows, *missing])
    if lines:
        figure.legend(loc="outside lower center", ncols=2, handlelength=1.8)
    return figure


def runs(backends: Mapping[str, Sequence[Row]], names: Sequence[str]) -> "Figure":
    """Draw the times of several runs, one row a backend, one marker a run, the first run on top of its row."""
    figure, (axes,) = _figure(len(backends))
    named: set[str] = set()
    for y, rows in enumerate(backends.values()):
        for row in rows:
            assert row.median is not None
            i = names.index(row.run)
            height = y + 0.5 * ((i + 0.5) / len(names) - 0.5)
            colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
            label = None if row.run in named else row.run
            named.add(row.run)
            axes.plot([row.p5 or row.median, row.p95 or row.median], [height] * 2, color=colour, lw=1.8)
            axes.plot([row.median], [height], color=colour, marker=marker, ms=5.5, ls="", label=label)
    _log(
        axes, "x", [t for rows in backends.values() for r in rows for t in (r.p5, r.p95, r.median) if t], units.seconds
    )
    _names(axes, [rows[0] for rows in backends.values()])
    figure.legend(loc="outside lower center", ncols=1 if max(map(len, names)) > 20 else 2, handlelength=1.0)
    return figure


def scaling(lines: Mapping[str, Sequence[Row]], colours: Colours) -> "Figure":
    """Draw time and memory against the batch size, one line a backend."""
    figure, panels = _figure(6, panels=2)
    for axes, value, label in zip(panels, ("median", "peak"), ("time of a call", "peak memory"), strict=True):
        for name, rows in lines.items():
            points = [(r.batch, getattr(r, value)) for r in rows if getattr(r, value)]
            if not points:
                continue
            colour, marker = colours.get(name, (INK, ""))
            style: dict[str, Any] = {"ls": LINES.get(name, "-"), "lw": 1.1 if name in LINES else 1.6, "ms": 4.5}
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, marker=marker, label=name if value == "median" else None, **style)
        axes.set(xscale="log", ylabel=label)
        sizes = sorted({r.batch for rows in lines.values() for r in rows if r.batch})
        axes.set_xticks(shown := thinned(sizes, 8), [str(n) for n in shown])
        axes.minorticks_off()
        found = [getattr(r, value) for rows in lines.values() for r in rows if getattr(r, value)]
        _log(axes, "y", found, units.seconds if value == "median" else units.size)
    panels[-1].set_xlabel("batch size N")
    figure.legend(loc="outside lower center", ncols=2, handlelength=2.2)
    return figure


def frontier(lines: Mapping[str, Sequence[tuple[int, float]]], ends: Mapping[str, str], colours: Colours) -> "Figure":
    """Draw the time of a sample against the batch size, one line a backend, marked where and by what it ended.

    Args:
        lines: Of each name, (N, seconds a sample), the smallest N first; at least one.
        ends: Of each name, what ended it.
        colours: Of the backends.
    """
    figure, (axes,) = _figure(8)
    for name, points in lines.items():
        colour, marker = colours.get(name, (INK, ""))
        style: dict[str, Any] = {"ls": LINES.get(name, "-"), "lw": 1.1 if name in LINES else 1.6, "ms": 4.5}
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name, **style)
        axes.plot(*points[-1], ENDS.get(ends[name], "*"), color=INK, ms=9, mew=1.6, mfc="none", zorder=3)
    for end in dict.fromkeys(ends[name] for name in lines):
        axes.plot([], [], ENDS.get(end, "*"), color=INK, ms=8, mew=1.6, mfc="none", label=f"ended by {end}")
    sizes, found = zip(*(point for points in lines.values() for point in points), strict=True)
    _log(axes, "y", [min(found) / 1.4, max(found) * 1.4], units.seconds)
    axes.set(xscale="log", xlabel="batch size N", ylabel="time of a sample")
    doubled = [2**k for k in range(max(sizes).bit_length()) if 2**k >= min(sizes)] or [min(sizes)]
    axes.set_xticks(shown := thinned(doubled, 6), [str(n) for n in shown])
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2, handlelength=2.2)
    return figure


def errors(rows: Sequence[Row], dtype: str, colours: Colours) -> "Figure":
    """Draw the samples' errors, one row a backend."""
    figure, (axes,) = _figure(len(rows))
    u = UNIT_ROUNDOFF.get(dtype)
    found = [e for r in rows for e in (*(e for _, e in r.errors), r.error or 0.0) if e > 0]
    edge = min([*found, u or 1e-16]) / 3
    for y, row in enumerate(rows):
        colour, marker = _look(row, colours)
        plain = [max(e, edge) for i, e in row.errors if i not in row.ill_conditioned]
        marked = [max(e, edge) for i, e in row.errors if i in row.ill_conditioned]
        if not row.errors and row.error is not None:  # an earlier version recorded only the largest
            plain = [max(row.error, edge)]
        spread = 0.56 if len(plain) > 1 else 0.0
        heights = [y + spread * ((0.618034 * k) % 1 - 0.5) for k in range(len(plain))]  # evenly spread, not random
        axes.plot(plain, heights, marker, color=colour, ms=3.6, alpha=0.55, mew=0)
        axes.plot(marked, [y] * len(marked), "x", color=INK, ms=6.5, mew=1.6)
        if row.status != "ok":
            _beside(axes, y, row.status, grey=True)
    if u:
        axes.axvline(u, color=INK, lw=1.1, ls=":", label=f"one rounding in {dtype}, {u:.0e}", zorder=0.5)
    if any(row.ill_conditioned for row in rows):
        axes.plot([], [], "x", color=INK, ms=6.5, mew=1.6, label="ill-conditioned")
    axes.set_xlabel("relative error of a sample" if any(row.errors for row in rows) else "largest relative error")
    _log(axes, "x", [edge, max([edge * 30, *found])], lambda e: f"{e:.0e}".replace("e-0", "e-"))
    _names(axes, rows)
    figure.legend(loc="outside lower center", ncols=2, handlelength=1.8)
    return figure


def phases(rows: Sequence[Row], names: Sequence[str]) -> "Figure":
    """Draw the phases' times, one row a backend, one marker a phase."""
    figure, (axes,) = _figure(len(rows))
    for i, name in enumerate(names):
        points = [(r.phases[name], y) for y, r in enumerate(rows) if r.phases.get(name)]
        x, y = zip(*points, strict=True) if points else ((), ())
        look: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "color": PALETTE[i % len(PALETTE)]}
        axes.plot(x, y, ls="", ms=6.5, mec="white", mew=0.5, label=name, alpha=0.95, **look)
    _log(axes, "x", [r.phases[name] for r in rows for name in names if r.phases.get(name)], units.seconds)
    _names(axes, rows)
    figure.legend(loc="outside lower center", ncols=len(names), handlelength=1.0, columnspacing=1.2)
    return figure


def _figure(rows: int, panels: int = 1) -> tuple["Figure", list["Axes"]]:
    """Return an empty figure, as high as its rows need."""
    from matplotlib.figure import Figure  # not pyplot: a notebook's own figures stay as they are

    figure = Figure(figsize=(WIDTH, (0.95 + 0.34 * rows) * panels), layout="constrained")
    return figure, list(figure.subplots(panels, 1, squeeze=False, sharex=panels > 1)[:, 0])


def _look(row: Row, colours: Colours) -> tuple[str, str]:
    """Return colour and marker of a backend; what is not right is grey."""
    colour, marker = colours[row.backend]
    return (colour if row.status == "ok" else GREY), marker


def _names(axes: "Axes", rows: Sequence[Row]) -> None:
    """Write the backends' names down the left side, each option on a line of its own."""
    names = [r.backend.replace("(", "\n(", 1).replace(", ", ",\n") for r in rows]
    axes.set_yticks(range(len(rows)), names)
    if (lines := 1 + max(name.count("\n") for name in names)) > LINES_A_ROW:
        axes.figure.set_figheight(axes.figure.get_figheight() * lines / LINES_A_ROW)  # type: ignore[union-attr]
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _beside(axes: "Axes", y: float, text: str, grey: bool) -> None:
    """Write a row's number, or what became of it, at the right side."""
    where = axes.get_yaxis_transform()
    axes.text(1.02, y, text, transform=where, va="center", color=INK, alpha=0.65 if grey else 1.0, fontsize=9)


def _log(axes: "Axes", which: str, values: Sequence[float], say: Callable[[float], str]) -> None:
    """Make an axis logarithmic, with a few ticks at round numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    if values:
        low, high = min(values), max(values)
        pad = max(1.15, (high / low) ** 0.06)
        low, high = low / pad, high * pad
        (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
        axis.set_ticks(ticks := round_numbers(low, high), [say(t) for t in ticks])
    axis.minorticks_off()


def round_numbers(low: float, high: float, most: int = 5) -> list[float]:
    """Return some round numbers between two positive ones, at most so many, evenly spread on a logarithmic axis."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(1 + i / 10 for i in range(90))):
        found = [d * 10.0**k for k in range(first, last + 1) for d in digits if low <= d * 10.0**k <= high]
        if len(found) >= 3:
            break
    return thinned(found, most)


def thinned(values: Sequence[T], most: int = 5) -> list[T]:
    """Return at most so many of some values, evenly spaced, the first among them."""
    return list(values[:: max(1, math.ceil(len(values) / most))])
