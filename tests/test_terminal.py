"""Tables on terminals of any width: no number without its unit, no row without its name."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from testbed.commands import compare, precision
from testbed.comparison import compare as changes
from testbed.precision import Errors
from testbed.report import Report
from tests.made_up import record

NAMES = ("naive", "expanded_weights", "opacus_ghost", "nngeometry")
RECORDS = [record(name, 0.0159 * 10**i) for i, name in enumerate(NAMES)]
REFUSED = record("refuses", status="unsupported")
WIDTHS = [20, 40, 50, 60, 80, 120]


def console(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, no_color=True, force_terminal=False)


def printed(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    lines = shown.file.getvalue().splitlines()
    assert max(map(len, lines)) <= shown.width
    return "\n".join(lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_keeps_names_and_units(width: int) -> None:
    shown = console(width)
    Report([*RECORDS, REFUSED]).print(shown)
    table = printed(shown).split("•")[0]
    assert "…" not in table
    for time in ("15.9 ms", "159 ms", "1.59 s", "15.9 s"):
        assert time in table or time.replace(" ", "\n") in "\n".join(table.split()), time
    if width >= 40:
        first = [line.split(" ")[0] for line in table.splitlines()]
        assert all(name in first or f"{name[:12]}" in table for name in NAMES)
        assert "unsupported" in table
    assert ("no room for: way, first" in " ".join(table.split())) == (width < 80)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_comparison_keeps_verdicts_and_ratios(width: int) -> None:
    new = [replace(r, timing={**r.timing, "samples_s": [2 * s for s in r.timing["samples_s"]]}) for r in RECORDS]
    shown = console(width)
    compare._print_grid(changes(RECORDS, new), shown)
    table = printed(shown)
    assert table.count("worse") + table.count("can't") == len(NAMES) or width < 40
    assert table.count("2.00") >= len(NAMES)


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_precision_keeps_exponents_and_names(width: int) -> None:
    found = [Errors(name, "bfloat16", "ok", "", (0, 1), (1.2e-07, 3.4e-05)) for name in NAMES]
    shown = console(width)
    precision._show(found, (), shown)
    table = printed(shown).split("Norms by")[0]
    assert "…" not in table
    assert table.count("3.4e-05") >= len(NAMES)
    assert all(name[:12] in table for name in NAMES)
