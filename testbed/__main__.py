"""The command line: `python -m testbed EXPERIMENT.yaml`, `python -m testbed list`."""

import argparse
import inspect
import io
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import testbed
from backends import available, load_plugin
from backends.base import BACKENDS, Unavailable, first_line
from backends.registry import Registry, options_of
from testbed.api import cells, run_experiment, set_precision
from testbed.experiment import Experiment, load_experiment, resolve_device
from testbed.problems import DATA, LOSSES, MODELS, ProblemError
from testbed.progress import progress
from testbed.records import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, Record, exit_code
from testbed.report import Report
from testbed.run_folder import RunFolder
from testbed.yaml_source import ConfigError

RUN_EXAMPLES = """examples:
  python -m testbed experiments/mnist.yaml
  python -m testbed experiments/mnist.yaml --only naive,vmap --set batch_size=16 --set timing.rounds=5
  python -m testbed experiments/digits.yaml --device cuda --out runs/digits-on-gpu
  python -m testbed my.yaml --plugin my_model.py --dry-run
  python -m testbed list backends

exit codes: 0 as expected, 1 a backend is wrong, 2 usage, 3 a cell failed, 130 interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without "×" gets its code, not an exception
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command: Callable[[Sequence[str]], int] = _list if arguments[:1] == ["list"] else _run
    try:
        code = command(arguments)
        sys.stdout.flush()
        return code
    except (ConfigError, ProblemError) as error:
        print(f"testbed: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("testbed: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read the output has enough, as in `… list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return EXIT_INTERRUPTED
    except Exception:  # a fault of the program or of a plug-in; Python's own exit code 1 would say "a backend is wrong"
        traceback.print_exc()
        return EXIT_FAILED


def _run(arguments: Sequence[str]) -> int:
    """Run an experiment: progress on stderr, the table on stdout, records in the run folder."""
    parser = argparse.ArgumentParser(
        prog="python -m testbed",
        description="Check ways of computing per-sample gradients against each other, and time them.",
        epilog=RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", metavar="EXPERIMENT.yaml", help="what to run; see experiments/README.md")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the run folder (default: runs/<name>-<time>)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="instead of the experiment's")
    _add_plugin(parser)
    parser.add_argument("--only", metavar="NAME,...", default="", help="only these backends of the experiment")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="replace a part of the experiment (repeatable)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would run, run nothing")
    version = f"testbed {testbed.__version__} (torch {torch.__version__}, Python {platform.python_version()})"
    parser.add_argument("--version", action="version", version=version)
    options = parser.parse_args(arguments)

    _load_plugins(options.plugin)
    chosen = [*options.set, *([f"device={options.device}"] if options.device else [])]
    experiment = load_experiment(options.experiment, chosen, [n for n in options.only.split(",") if n])
    device = resolve_device(experiment.device)
    if options.dry_run:
        return _dry_run(experiment, device)
    name = Path(options.experiment).stem
    folder = RunFolder.create(options.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    set_precision(experiment)
    folder.describe(experiment, device)
    auto = " (auto)" if experiment.device == "auto" else ""
    print(f"{name}: {experiment.description.strip() or 'no description'}\ndevice: {device}{auto}\n", flush=True)
    records: list[Record] = []

    def emit(record: Record, traceback: str) -> None:
        records.append(record)
        folder.append(record, traceback)

    interrupted = False
    try:
        with progress() as shown:
            run_experiment(experiment, name, device, emit, shown)
    except KeyboardInterrupt:
        interrupted = True
    Report(records).print(Console())
    print(f"{'interrupted; what was measured is' if interrupted else 'records'} in {folder.path}")
    return EXIT_INTERRUPTED if interrupted else exit_code(records, experiment.expect)


def _dry_run(experiment: Experiment, device: torch.device) -> int:
    print(experiment.to_yaml())
    for cell in cells(experiment.resolved_backends(), experiment.quantities):
        print(f"would run {cell.quantity} with {cell.label} on {device}")
    return EXIT_OK


def _list(arguments: Sequence[str]) -> int:
    """List what there is, each with its first line of documentation and its options."""
    parser = argparse.ArgumentParser(prog="python -m testbed list", description="List what there is.")
    kinds = ("backends", "models", "data", "losses", "experiments")
    parser.add_argument("kind", nargs="?", choices=kinds, help="only this (default: all)")
    _add_plugin(parser)
    options = parser.parse_args(list(arguments)[1:])
    _load_plugins(options.plugin)
    available()
    registries: dict[str, Registry[Any]] = {"backends": BACKENDS, "models": MODELS, "data": DATA, "losses": LOSSES}
    for kind in [options.kind] if options.kind else kinds:
        print(kind)
        lines = _experiments() if kind == "experiments" else _entries(registries[kind])
        for name, about in lines:
            print(f"  {name:<24} {about}")
    return EXIT_OK


def _entries(registry: Registry[Any]) -> list[tuple[str, str]]:
    found = []
    for name in registry:
        thing = registry[name]
        about = next(iter((inspect.getdoc(thing) or "").splitlines()), "")
        if options := ", ".join(options_of(thing)):
            about += f" (options: {options})"
        if registry is BACKENDS:
            try:
                thing.load()
            except Unavailable as error:
                about = f"unavailable: {error}"
        found.append((name, about))
    return found


def _experiments() -> list[tuple[str, str]]:
    folder = Path("experiments") if Path("experiments").is_dir() else Path(__file__).parent.parent / "experiments"
    return [(str(f), _description(f)) for f in sorted(folder.glob("**/*.yaml"))]


def _description(file: Path) -> str:
    try:
        return load_experiment(file).description.strip()
    except ConfigError as error:
        return f"cannot be run: {error}"


def _add_plugin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin",
        metavar="FILE",
        action="append",
        default=[],
        help="a Python file that registers backends, models, data or losses (repeatable)",
    )


def _load_plugins(files: Sequence[str]) -> None:
    for file in files:
        try:
            load_plugin(file)
        except (Exception, SystemExit) as error:
            line = _line_in(file, error)
            place = f"{file}:{line}" if line else file
            raise ConfigError(f"{place}: {type(error).__name__}: {first_line(error)}") from None


def _line_in(file: str, error: BaseException) -> int | None:
    """Return the line of a plug-in in which an error arose."""
    plugin = Path(file).resolve()
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename) == plugin:
        return error.lineno
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == plugin]
    return frames[-1].lineno if frames else None


if __name__ == "__main__":
    sys.exit(main())
