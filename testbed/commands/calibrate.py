"""`python -m testbed calibrate`: measure the agreement check itself."""

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from backends.registry import unknown
from testbed.calibrate import SPECS, Tally, calibrate
from testbed.calibration_report import FILE, save, show
from testbed.commands.arguments import directory, names
from testbed.commands.plugins import add_plugin, load_plugins
from testbed.config.experiment import resolve_device
from testbed.config.yaml_source import ConfigError
from testbed.progress import progress
from testbed.records import EXIT_OK, EXIT_WRONG
from testbed.run_folder import RunFolder

DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(arguments: Sequence[str]) -> int:
    """Run the command; exit code 1 where there is a false alarm."""
    parser = argparse.ArgumentParser(
        prog="python -m testbed calibrate",
        description="Count false alarms of the agreement check, and find the smallest planted error it catches.",
        epilog="float64 is question 1 (the same function?), the others are question 2 (how precise?).",
    )
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="problems of each kind (default: 10)")
    parser.add_argument("--model", type=names, default=",".join(SPECS), metavar="NAME,...", help="default: %(default)s")
    parser.add_argument(
        "--dtype", type=names, default="float32,bfloat16,float64", metavar="NAME,...", help="default: %(default)s"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--out", type=directory, metavar="DIR", help="default: runs/calibrate-<time>")
    add_plugin(parser)
    options = parser.parse_args(arguments)
    load_plugins(options.plugin)
    if options.seeds < 1:
        raise ConfigError(f"--seeds: should be at least 1, found {options.seeds}")
    _refuse_unknown("model", options.model, tuple(SPECS))
    _refuse_unknown("dtype", options.dtype, DTYPES)
    device = resolve_device(options.device)
    out = options.out or Path("runs") / f"calibrate-{time.strftime('%Y%m%d-%H%M%S')}"
    kept = RunFolder.create(out, FILE)  # what cannot be kept need not be measured
    tallies: list[Tally] = []
    try:
        with progress() as shown, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn of speed here, which is not measured
            shown.begin("calibrate", options.seeds * len(options.model) * len(options.dtype) * 2)
            calibrate(range(options.seeds), options.dtype, options.model, str(device), step=shown.step, tallies=tallies)
    finally:  # Ctrl-C loses the problem that is being measured
        if any(t.runs for t in tallies):
            show(tallies, Console())
            save(tallies, kept.path)
            print(f"data and picture in {kept.path}")
    return EXIT_WRONG if any(t.blamed for t in tallies) else EXIT_OK


def _refuse_unknown(kind: str, asked: Sequence[str], known: Sequence[str]) -> None:
    for name in asked:
        if name not in known:
            raise ConfigError(f"--{kind}: {unknown(kind, name, known)}")
