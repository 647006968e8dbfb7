"""`python -m testbed doctor`: is this machine fit to measure on?"""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from testbed.doctor import Finding, Grade, examine
from testbed.records import EXIT_OK

STYLES = {Grade.BAD: "bold red", Grade.CARE: "bold yellow", Grade.FINE: "green", Grade.UNKNOWN: "dim"}


def main(arguments: Sequence[str]) -> int:
    """Print what was found, the worst first."""
    argparse.ArgumentParser(
        prog="python -m testbed doctor",
        description="Say what about this machine would make its numbers untrustworthy, and how to mend it. "
        "It only looks, for a second or two: it changes nothing.",
        epilog="✗ spoils numbers measured now · ! may matter · ✓ as it should be · ? cannot be seen here",
    ).parse_args(arguments)
    show(examine(), Console())
    return EXIT_OK


def show(found: Sequence[Finding], console: Console) -> None:
    """Print findings, the worst first, with what they do and how to mend them."""
    for grade in Grade:
        for finding in (f for f in found if f.grade is grade):
            line = Text(f"{grade.value} ", style=STYLES[grade])
            line.append(f"{finding.topic}: ", style="bold" if grade in (Grade.BAD, Grade.CARE) else "")
            line.append(finding.what, style="not bold default")
            console.print(line)
            for name, text in (("so", finding.effect), ("mend", finding.mend)):
                if text:
                    console.print(Padding(Text(f"{name}: {text}"), (0, 0, 0, 4)))
    console.print(Text(f"\n{verdict(found)}", style="bold"))


def verdict(found: Sequence[Finding]) -> str:
    """Return the conclusion in a sentence."""
    bad = sum(f.grade is Grade.BAD for f in found)
    care = sum(f.grade is Grade.CARE for f in found)
    known = f"{care} thing{'s' if care != 1 else ''} to know" if care else "nothing else to know"
    if not bad:
        return f"Fit to measure on; {known}."
    return f"Not fit to measure on now: {bad} thing{'s' if bad != 1 else ''} to mend first; {known}."
