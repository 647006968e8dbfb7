"""`python -m testbed EXPERIMENT.yaml …`: run an experiment, or several, one after the other."""

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

import testbed
from testbed.commands.arguments import directory, names
from testbed.commands.plugins import add_plugin, load_plugins
from testbed.config.experiment import Experiment, resolve_device
from testbed.config.load import load_experiment
from testbed.config.yaml_source import ConfigError
from testbed.jobs import about_problem, identities, isolated, run_experiment, set_precision
from testbed.problems import ProblemError
from testbed.progress import progress
from testbed.records import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, EXIT_WRONG, Record, exit_code
from testbed.report import Report
from testbed.report.page import draw_page
from testbed.report.titles import title
from testbed.run_folder import ERRORS, RunFolder

RUN_EXAMPLES = """examples:
  python -m testbed experiments/mnist.yaml
  python -m testbed experiments/mnist.yaml --only naive,vmap --set batch_size=16 --set timing.rounds=5
  python -m testbed experiments/digits.yaml --device cuda --out runs/digits-on-gpu
  python -m testbed experiments/scaling.yaml --set 'batch_size=[1, 16]' --set 'quantities=[norms]'
  python -m testbed my.yaml --plugin my_model.py --dry-run
  python -m testbed --resume runs/mnist-20260101-120000
  python -m testbed experiments/published/*.yaml --set size=small --out runs/published

other commands, each with its own --help:
  python -m testbed list [backends|models|data|losses|experiments]
  python -m testbed precision EXPERIMENT.yaml     errors sample by sample, in several dtypes
  python -m testbed calibrate                     the check's own error rates
  python -m testbed conformance                   every layer and option of torch.nn × every backend
  python -m testbed report DIR [DIR ...]          a run's page, several side by side; or the table as md, csv, latex
  python -m testbed compare OLD NEW               cell by cell: better, worse, can't tell
  python -m testbed frontier EXPERIMENT.yaml      the largest batch that fits, and the time of a sample up to it
  python -m testbed doctor                        is this machine fit to measure on?

exit codes: 0 as expected, 1 a backend is wrong, 2 usage, 3 a cell failed, 130 interrupted
"""


def main(arguments: Sequence[str]) -> int:
    """Run an experiment: progress on stderr, the table on stdout, records in the run folder."""
    parser = argparse.ArgumentParser(
        prog="python -m testbed",
        description="Check ways of computing per-sample gradients against each other, and time them.",
        epilog=RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "experiments", metavar="EXPERIMENT.yaml", nargs="*", type=Path, help="what to run; see experiments/README.md"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=directory,
        help="the run folder (default: runs/<name>-<time>); of several, DIR/<name>",
    )
    parser.add_argument(
        "--resume",
        metavar="DIR",
        type=directory,
        help="go on with the run in this folder: run what has no valid record",
    )
    parser.add_argument("--retry-failed", action="store_true", help="with --resume: run again what has failed, too")
    parser.add_argument(
        "--in-process", action="store_true", help="run all in this process, for debugging; a crash then ends the run"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="instead of the experiment's")
    add_plugin(parser)
    parser.add_argument(
        "--only", metavar="NAME,...", type=names, default=[], help="only these backends of the experiment"
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="replace a part of the experiment (repeatable)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would run, run nothing")
    version = f"testbed {testbed.__version__} (torch {torch.__version__}, Python {platform.python_version()})"
    parser.add_argument("--version", action="version", version=version)
    options = parser.parse_args(arguments)

    if not options.experiments and options.resume is None:
        parser.error("the following arguments are required: EXPERIMENT.yaml, or --resume DIR")
    if options.resume and options.out:
        parser.error("--resume DIR writes into DIR; --out is not allowed with it")
    if options.resume and len(options.experiments) > 1:
        parser.error(f"--resume DIR goes on with one run; found {len(options.experiments)} experiments")
    if options.retry_failed and not options.resume:
        parser.error("--retry-failed is for --resume DIR")

    load_plugins(options.plugin)
    files = options.experiments or [options.resume / "experiment.yaml"]
    if len(twice := [file for file in files if [f.stem for f in files].count(file.stem) > 1]) > 1:
        raise ConfigError(f"{twice[1]}: '{twice[1].stem}' is the name of {twice[0]} too; run them one at a time")
    chosen = [*options.set, *([f"device={options.device}"] if options.device else [])]
    try:
        loaded = [(file.stem, load_experiment(file, chosen, options.only)) for file in files]  # a mistake costs no run
    except ConfigError as error:
        if options.resume and not (options.plugin or options.experiments):  # the folder's own file was right once
            raise ConfigError(f"{error}; what was run with --plugin FILE is resumed with it") from None
        raise
    codes = {EXIT_OK}
    for count, (name, experiment) in enumerate(loaded, 1):
        if len(loaded) > 1:
            print(f"{'' if count == 1 else chr(10)}experiment {count} of {len(loaded)}", flush=True)
        try:
            codes.add(_run(name, experiment, options, several=len(loaded) > 1))
        except ProblemError as error:
            if len(loaded) == 1:
                raise
            print(f"testbed: error: {name}: {error}", file=sys.stderr)
            codes.add(EXIT_USAGE)
        if EXIT_INTERRUPTED in codes:
            break
    return next(code for code in (EXIT_INTERRUPTED, EXIT_WRONG, EXIT_FAILED, EXIT_USAGE, EXIT_OK) if code in codes)


def _run(name: str, experiment: Experiment, options: argparse.Namespace, *, several: bool) -> int:
    """Run one experiment; returns its exit code."""
    device = resolve_device(experiment.device)
    if options.dry_run:
        return _dry_run(experiment, device)
    isolation = None if options.in_process else isolated(experiment, options.plugin)
    kept: list[Record] = []
    wanted: list[str] = []
    dropped = 0
    if options.resume:
        folder = RunFolder.resume(options.resume)
        wanted = identities(experiment, device, isolation)
        kept, dropped = folder.keep(wanted, experiment.limits.model_dump(), retry_failed=options.retry_failed)
        name = kept[0].experiment if kept else name
    else:
        out = options.out / name if options.out and several else options.out
        folder = RunFolder.create(out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}", go_on="--resume")
    set_precision(experiment.problems[0])
    folder.describe(experiment, device)
    auto = " (auto)" if experiment.device == "auto" else ""
    print(f"{name}: {experiment.description.strip() or 'no description'}\ndevice: {device}{auto}")
    print(f"{_extent(experiment)}\n" if len(experiment.problems) > 1 or experiment.exclude else "", flush=True)
    if options.resume:
        aside = f"; {_count(dropped, 'other record')} went to superseded.jsonl" if dropped else ""
        print(f"resumed: {len(kept)} of {len(wanted)} cells have their record{aside}\n", flush=True)
    records = list(kept)

    shown = progress()

    def emit(record: Record, traceback: str) -> None:
        records.append(record)
        folder.append(record, traceback)
        shown.ended()

    interrupted, problem_error = False, None
    try:
        with shown:
            shown.expect(len(experiment.chosen()) - len(kept))
            finished = {record.cell for record in kept}
            run_experiment(experiment, name, device, emit, shown, isolation, finished)
    except KeyboardInterrupt:
        if not records:
            raise
        interrupted = True
    except ProblemError as error:
        if not records:
            raise
        problem_error = error
    if options.resume:  # what was kept and what is new, in the order of a run in one go
        records.sort(key=lambda record: wanted.index(record.cell))
    Report(records, experiment.published, experiment.size).print(Console())
    print(f"{'interrupted; what was measured is' if interrupted else 'records'} in {folder.path}")
    if (folder.path / ERRORS).exists():
        print(f"tracebacks in {folder.path / ERRORS}")
    draw_page(records, folder.path)
    if problem_error:
        raise problem_error
    return EXIT_INTERRUPTED if interrupted else exit_code(records, experiment.expect)


def _extent(experiment: Experiment) -> str:
    """Return how much there is to run: problems, cells, and what `exclude` keeps out."""
    chosen, everything = experiment.chosen(), list(experiment.combinations())
    problems = len({repr(c.problem) for c in chosen})
    excluded = f", {len(everything) - len(chosen)} more excluded" if len(everything) > len(chosen) else ""
    return f"to run: {_count(len(chosen), 'cell')} of {_count(problems, 'problem')}{excluded}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _dry_run(experiment: Experiment, device: torch.device) -> int:
    print(experiment.to_yaml())
    last = None
    for combination in experiment.chosen():
        if combination.problem != last and len(experiment.problems) > 1:
            print(f"{title(about_problem(combination.problem, device))}:")
        last = combination.problem
        print(f"would run {combination.quantity} with {combination.backend} on {device}")
    print(_extent(experiment))
    return EXIT_OK
