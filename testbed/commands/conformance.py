"""`python -m testbed conformance`: which backend is right, refuses, or would lie, for every layer and option."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from backends.base import QUANTITIES
from backends.registry import UnknownName
from testbed.commands.arguments import directory, names
from testbed.commands.plugins import add_plugin, load_plugins
from testbed.config.experiment import resolve_device
from testbed.config.yaml_source import ConfigError
from testbed.conformance import capabilities
from testbed.conformance.report import report
from testbed.conformance.sweep import choose_cases, choose_cells, sweep
from testbed.progress import progress
from testbed.records import EXIT_INTERRUPTED, Record, exit_code
from testbed.run_folder import RunFolder

EPILOG = """examples:
  python -m testbed conformance                                   grads, about a minute
  python -m testbed conformance --quantity all                    all quantities, five to thirteen minutes
  python -m testbed conformance --backend opacus --layer 'Conv*' --verbose
  python -m testbed conformance --plugin mine.py --backend mine --quantity all
  python -m testbed conformance --device cuda                     on a GPU
  python -m testbed conformance --unguarded                       what the raw libraries would return
  python -m testbed conformance --write-table backends/README.md

exit codes: 0 nothing is wrong, 1 a cell is wrong, 2 usage, 3 a cell is an error, 130 interrupted
"""


def main(arguments: Sequence[str]) -> int:
    """Run the sweep: progress on stderr, the matrix on stdout, records in the run folder."""
    parser = argparse.ArgumentParser(
        prog="python -m testbed conformance",
        description="Run backends on generated cases, every layer, option and way of use, in float64 on tiny shapes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--backend",
        metavar="NAME,...",
        type=names,
        default=[],
        help="only these: a name for all of its variants, or one variant as the matrix calls it",
    )
    parser.add_argument(
        "--layer", metavar="PATTERN", default="*", help="only matching rows (Conv*, 'model, tied') or cases"
    )
    parser.add_argument(
        "--quantity",
        metavar="NAME,...",
        type=names,
        default=["grads"],
        help=f"of {', '.join(QUANTITIES)}, or all (default: grads, from which the built-in backends derive the others)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--unguarded", action="store_true", help="judge what the raw libraries would return instead")
    parser.add_argument(
        "--out", metavar="DIR", type=directory, help="the run folder (default: runs/conformance-<time>)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="list every refusal with its reason")
    parser.add_argument(
        "--write-table", metavar="FILE", type=Path, help="run all of grads, and put the capability table into a file"
    )
    add_plugin(parser)
    options = parser.parse_args(arguments)
    if options.write_table:
        _refuse_part_of_a_table(parser, options)
    load_plugins(options.plugin)
    device = resolve_device(options.device)
    try:
        cases = choose_cases(options.layer)
        quantities = QUANTITIES if options.quantity == ["all"] else options.quantity
        cells = choose_cells(options.backend, quantities)
    except UnknownName as error:
        raise ConfigError(str(error)) from None

    folder = RunFolder.create(options.out or Path("runs") / f"conformance-{time.strftime('%Y%m%d-%H%M%S')}")
    records: list[Record] = []

    def emit(record: Record, traceback: str) -> None:
        folder.append(record, traceback)
        records.append(record)

    interrupted = False
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the shapes are tiny: more threads only wait for each other
    try:
        folder.describe(None, device)
        with progress() as shown:
            sweep(cases, cells, emit, shown, guarded=not options.unguarded, device=device)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        torch.set_num_threads(threads)
    if records:
        print(report(records, options.verbose))
    print(f"\n{'interrupted; what was run is' if interrupted else 'records'} in {folder.path}")
    if interrupted:
        return EXIT_INTERRUPTED
    if options.write_table:
        capabilities.write(options.write_table, capabilities.capabilities(records))
        print(f"table in {options.write_table}")
    return exit_code(records)


def _refuse_part_of_a_table(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in ("backend", "layer", "quantity", "device", "unguarded", "plugin"):
        if getattr(options, name) != parser.get_default(name):
            raise ConfigError(
                f"--write-table: the table is of all backends and cases, grads, on a CPU; leave out --{name}"
            )
    if not capabilities.has_place(_text_of(options.write_table)):
        between = f"{capabilities.BEGIN} … {capabilities.END}"
        raise ConfigError(f"--write-table {options.write_table}: it has no {between} to write between")


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--write-table {file}: cannot be read: {error.strerror}") from None
