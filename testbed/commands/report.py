"""`python -m testbed report`: rebuild a run's page, put runs side by side, or print the table for elsewhere."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from testbed.commands.arguments import directory
from testbed.config.yaml_source import ConfigError
from testbed.records import EXIT_OK
from testbed.report.export import FORMATS
from testbed.report.runs import load_runs

EPILOG = """examples:
  python -m testbed report runs/mnist-20261101-120000                   its report.html, anew
  python -m testbed report runs/before runs/after --out runs/both       side by side
  python -m testbed report runs/mnist-20261101-120000 --format md       for a pull request
  python -m testbed report runs/mnist-20261101-120000 --format pytest-benchmark > run.json
"""


def main(arguments: Sequence[str]) -> int:
    """Write the page, or print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m testbed report",
        description="Make the page of a run, or of several side by side, from records alone; or print the table.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="DIR", nargs="+", type=Path, help="a run's folder, or its results.jsonl")
    parser.add_argument(
        "--out", metavar="DIR", type=directory, help="where to (default: the run's folder; several: runs/…)"
    )
    parser.add_argument("--format", choices=FORMATS, help="print the table instead")
    options = parser.parse_args(arguments)
    runs = load_runs(options.runs)
    if options.format:
        print(FORMATS[options.format](runs))
        return EXIT_OK
    from testbed.report.page import write_pages  # matplotlib: a second to import, and only the page needs it

    folder = options.out or _folder(options.runs)
    try:
        page = write_pages(runs, folder)
    except OSError as error:
        raise ConfigError(f"{folder}: the report cannot be written: {error.strerror}") from None
    print(f"report in {page}")
    return EXIT_OK


def _folder(paths: Sequence[Path]) -> Path:
    """Return the run's folder; for several runs a new one."""
    if len(paths) > 1:
        return Path("runs") / f"report-{time.strftime('%Y%m%d-%H%M%S')}"
    return paths[0] if paths[0].is_dir() else paths[0].parent
