"""`python -m testbed compare`: what became better or worse between two runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from testbed.comparison import VERDICTS, Change, compare, devices, differences, drift, floor
from testbed.config.yaml_source import ConfigError
from testbed.records import EXIT_OK, EXIT_REGRESSION
from testbed.report import units
from testbed.report.runs import Run, load_run
from testbed.report.terminal import print_table
from testbed.timing import Ratio

EPILOG = """examples:
  python -m testbed compare runs/before runs/after
  python -m testbed compare experiments/results/mnist-cpu/results.jsonl runs/mine --across-devices

better, worse: the interval of new/old excludes 1 by more than both runs' A/A floors together, in seconds and in
ordinary steps (a machine that is slower today is slower in both); or what was right is wrong, fails or refuses now,
or the other way round. can't tell: all else.

exit codes: 0 no regression, 2 usage, 4 a cell is worse
"""
STYLES = {"worse": "bold red", "better": "bold green"}


def main(arguments: Sequence[str]) -> int:
    """Print the comparison; exit code 4 where a cell is worse."""
    parser = argparse.ArgumentParser(
        prog="python -m testbed compare",
        description="Compare two runs cell by cell: better, worse, can't tell, new, gone.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", metavar="OLD", type=Path, help="a run's folder, or its results.jsonl")
    parser.add_argument("new", metavar="NEW", type=Path, help="the same of the newer run")
    parser.add_argument("--across-devices", action="store_true", help="compare even if the devices differ")
    options = parser.parse_args(arguments)
    old, new = load_run(options.old), load_run(options.new)
    before, after = devices(old.records), devices(new.records)
    if before != after and not options.across_devices:
        raise ConfigError(
            f"different devices: {', '.join(before)} in {options.old}, {', '.join(after)} in {options.new}; "
            "--across-devices compares them all the same"
        )
    changes = compare(old.records, new.records, control=before == after)
    _show(old, new, changes, Console())
    return EXIT_REGRESSION if any(c.verdict == "worse" for c in changes) else EXIT_OK


def _show(old: Run, new: Run, changes: Sequence[Change], console: Console) -> None:
    console.print(Text(f"old: {old.name}\nnew: {new.name}"))
    _show_differences(old, new, console)
    moved = drift(old.records, new.records)
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in [*changes, *moved]:
        groups.setdefault((change.problem, change.quantity), []).append(change)
    for (problem, quantity), group in groups.items():
        console.print(Text(f"\n{quantity} · {problem}", style="bold"))
        _print_grid(group, console)
        for change in group:
            if change.why:
                console.print(Text(f"• {change.backend}: {change.why}"))
    console.print()
    for line in _conclusions(old, new, changes, moved):
        console.print(Text(f"• {line}"))


def _show_differences(old: Run, new: Run, console: Console) -> None:
    found = differences(old.records, new.records)
    if not found:
        console.print("environment: the same")
        return
    console.print("environment:")
    for key, (before, after) in found.items():
        console.print(Text(f"  {key}: {before} → {after}"))


def _print_grid(changes: Sequence[Change], console: Console) -> None:
    rows: list[list[str | Text]] = []
    for c in changes:
        memory = "–" if c.memory is None else units.ratio(c.memory)
        cells = [_value(c.old), _value(c.new), _ratio(c.ratio), _ratio(c.in_steps), memory]
        rows.append([c.backend, Text(c.verdict, style=STYLES.get(c.verdict, "")), *cells])
    header = ("backend", "verdict", "old", "new", "new / old", "in steps", "peak")
    drop = ("peak", "in steps", "old", "new")
    print_table(console, header, rows, left=header[:2], fold=header[:1], drop=drop)


def _conclusions(old: Run, new: Run, changes: Sequence[Change], moved: Sequence[Change]) -> list[str]:
    """Return what the table means, in words."""
    counts = [(sum(c.verdict == v for c in changes), v) for v in VERDICTS]
    beside = " The ordinary step is not counted." if moved else ""
    found = [", ".join(f"{n} {v}" for n, v in counts if n) + f".{beside}"]
    floors = [max(map(floor, run.records), default=0.0) for run in (old, new)]
    if all(floors):
        noise = [units.noise(f) for f in floors]
        found.append(f"Noise: the baseline against itself was off by up to {noise[0]} (old) and {noise[1]} (new).")
    else:
        found.append("A run has no A/A floor (no baseline was timed): its noise is known from the intervals only.")
    if shifted := [c for c in moved if c.verdict in ("better", "worse")]:
        ratios = ", ".join(units.ratio(c.ratio.value) for c in shifted if c.ratio)
        found.append(
            f"The ordinary step, which no backend's code is in, takes {ratios} times as long as in the old run: the "
            "machine or PyTorch changed. A cell that moved with it is “can't tell”: see “in steps”."
        )
    return found


def _ratio(found: Ratio | None) -> str:
    return f"{units.ratio(found.value)}\n{units.interval([found.low, found.high]).strip()}" if found else "–"


def _value(value: float | str) -> str:
    return (value or "–") if isinstance(value, str) else units.seconds(value)
