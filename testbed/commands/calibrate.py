"""`python -m testbed calibrate`: measure the agreement check itself."""

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from backends.registry import unknown
from testbed.calibrate import SPECS, Tally, calibrate
from testbed.calibration_report import save, show
from testbed.commands.plugins import add_plugin, load_plugins
from testbed.config.experiment import resolve_device
from testbed.config.yaml_source import ConfigError
from testbed.progress import progress
from testbed.records import EXIT_OK, EXIT_WRONG

DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(arguments: Sequence[str]) -> int:
    """Run the command; exit code 1 where there is a false alarm."""
    parser = argparse.ArgumentParser(
        prog="python -m testbed calibrate",
        description="Count false alarms of the agreement check, and find the smallest planted error it catches.",
        epilog="float64 is question 1 (the same function?), the others are question 2 (how precise?).",
    )
    parser.add_argument("--seeds", type=int, default=10, metavar="N", help="problems of each kind (default: 10)")
    parser.add_argument("--model", default=",".join(SPECS), metavar="NAME,...", help="default: %(default)s")
    parser.add_argument("--dtype", default="float32,bfloat16,float64", metavar="NAME,...", help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/calibrate-<time>")
    add_plugin(parser)
    options = parser.parse_args(arguments)
    load_plugins(options.plugin)
    if options.seeds < 1:
        raise ConfigError(f"--seeds: should be at least 1, found {options.seeds}")
    specs = _names("--model", "model", options.model, tuple(SPECS))
    dtypes = _names("--dtype", "dtype", options.dtype, DTYPES)
    device = resolve_device(options.device)
    folder = options.out or Path("runs") / f"calibrate-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be kept need not be measured
    tallies: list[Tally] = []
    try:
        with progress() as shown, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn of speed here, which is not measured
            shown.begin("calibrate", options.seeds * len(specs) * len(dtypes) * 2)
            calibrate(range(options.seeds), dtypes, specs, str(device), step=shown.step, tallies=tallies)
    finally:  # Ctrl-C loses the problem that is being measured
        if any(t.runs for t in tallies):
            show(tallies, Console())
            save(tallies, folder)
            print(f"data and picture in {folder}")
    return EXIT_WRONG if any(t.blamed for t in tallies) else EXIT_OK


def _names(option: str, kind: str, text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: {unknown(kind, name, known)}")
    return names
