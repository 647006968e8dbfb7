"""A calibration as a table, a picture and plain data."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table

from testbed.agreement import Calibrated
from testbed.calibrate import DRAWS, FACTORS, PLANTED, SIZES, Tally

FILE = "calibration.json"


def show(tallies: Sequence[Tally], console: Console) -> None:
    """Print false alarms and smallest caught errors at the rule's defaults, then alarms for other factors and draws."""
    default = Calibrated()
    console.print(f"At the rule's defaults (factor {default.factor:g}, {default.draws} draws):")
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("dtype", "weights", "cases", "alarms", *PLANTED):
        grid.add_column(column, justify="left" if column in ("dtype", "weights") else "right")
    for t in tallies:
        caught = [_caught(t.caught.get(kind, [])) for kind in PLANTED]
        alarms = str(t.alarms.get((default.factor, default.draws), 0))
        grid.add_row(_dtype(t), _weights(t), str(t.problems), f"{alarms} of {t.runs}", *caught)
    console.print(grid)
    console.print("alarms: false ones, of so many right results. Planted relative errors: the smallest that is")
    console.print("caught, in the median case / in the worst. Q1 asks whether it is the same function.\n")
    console.print("False alarms for other factors c and numbers of draws K:")
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("dtype", "weights", "K", *(f"c={c:g}" for c in FACTORS)):
        grid.add_column(column, justify="left" if column in ("dtype", "weights") else "right")
    for t in tallies:
        for k in DRAWS:
            grid.add_row(_dtype(t), _weights(t), str(k), *(str(t.alarms.get((c, k), 0)) for c in FACTORS))
    console.print(grid)
    for t in tallies:
        for blamed in t.blamed:
            console.print(f"false alarm, {_dtype(t)}, {_weights(t)}: {blamed}")


def save(tallies: Sequence[Tally], folder: Path) -> None:
    """Write `calibration.json`, and the picture as `calibration.png` and `.svg`."""
    import matplotlib as mpl

    mpl.use("Agg")  # no screen is needed
    from matplotlib import pyplot as plt  # a second to import, and only pictures need it

    data = json.dumps([t.plain() for t in tallies], indent=1).replace("Infinity", '"never"')
    (folder / FILE).write_text(data + "\n", encoding="utf-8")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, t in enumerate(tallies):
        name, style = f"{_dtype(t)}, {_weights(t)}", ("-", "--")[t.trained]
        shares = [100 * t.alarms.get((c, Calibrated().draws), 0) / max(1, t.runs) for c in FACTORS]
        left.plot(FACTORS, shares, style, marker="o", color=f"C{i // 2}", label=name)
        smallest = t.caught.get("one parameter", [])
        share = [100 * sum(s <= size for s in smallest) / max(1, len(smallest)) for size in SIZES]
        right.plot(SIZES, share, style, marker=".", color=f"C{i // 2}", label=name)
    left.axvline(Calibrated().factor, color="gray", lw=0.8)
    left.set(xlabel="factor c", ylabel="false alarms, % of right results", title="Does the check cry wolf?")
    right.set(xscale="log", xlabel="relative error planted in one parameter", ylabel="caught, % of problems")
    right.set_title("How small an error does it catch?")
    left.set_ylim(bottom=0)
    right.legend(fontsize=8)
    for ending in ("png", "svg"):
        figure.savefig(folder / f"calibration.{ending}", dpi=150)
    plt.close(figure)


def _caught(smallest: Sequence[float]) -> str:
    return f"{median(smallest):.0e} / {max(smallest):.0e}" if smallest else "–"


def _dtype(t: Tally) -> str:
    return "float64 (Q1)" if t.dtype == "float64" else t.dtype


def _weights(t: Tally) -> str:
    return "trained" if t.trained else "random"
