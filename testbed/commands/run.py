"""`python -m testbed EXPERIMENT.yaml`: run an experiment."""

import argparse
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

import testbed
from testbed.api import about_problem, run_experiment, set_precision
from testbed.commands.plugins import add_plugin, load_plugins
from testbed.experiment import Experiment, resolve_device
from testbed.load import load_experiment
from testbed.problems import ProblemError
from testbed.progress import progress
from testbed.records import EXIT_INTERRUPTED, EXIT_OK, Record, exit_code
from testbed.report import Report
from testbed.report.titles import title
from testbed.run_folder import RunFolder

RUN_EXAMPLES = """examples:
  python -m testbed experiments/mnist.yaml
  python -m testbed experiments/mnist.yaml --only naive,vmap --set batch_size=16 --set timing.rounds=5
  python -m testbed experiments/digits.yaml --device cuda --out runs/digits-on-gpu
  python -m testbed experiments/scaling.yaml --set 'batch_size=[1, 16]' --set 'quantities=[norms]'
  python -m testbed my.yaml --plugin my_model.py --dry-run

other commands, each with its own --help:
  python -m testbed list [backends|models|data|losses|experiments]
  python -m testbed precision EXPERIMENT.yaml     errors sample by sample, in several dtypes
  python -m testbed calibrate                     the check's own error rates
  python -m testbed conformance                   every layer and option of torch.nn × every backend

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
    parser.add_argument("experiment", metavar="EXPERIMENT.yaml", help="what to run; see experiments/README.md")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the run folder (default: runs/<name>-<time>)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="instead of the experiment's")
    add_plugin(parser)
    parser.add_argument("--only", metavar="NAME,...", default="", help="only these backends of the experiment")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="replace a part of the experiment (repeatable)"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would run, run nothing")
    version = f"testbed {testbed.__version__} (torch {torch.__version__}, Python {platform.python_version()})"
    parser.add_argument("--version", action="version", version=version)
    options = parser.parse_args(arguments)

    load_plugins(options.plugin)
    chosen = [*options.set, *([f"device={options.device}"] if options.device else [])]
    experiment = load_experiment(options.experiment, chosen, [n for n in options.only.split(",") if n])
    device = resolve_device(experiment.device)
    if options.dry_run:
        return _dry_run(experiment, device)
    name = Path(options.experiment).stem
    folder = RunFolder.create(options.out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    set_precision(experiment.problems[0])
    folder.describe(experiment, device)
    auto = " (auto)" if experiment.device == "auto" else ""
    print(f"{name}: {experiment.description.strip() or 'no description'}\ndevice: {device}{auto}")
    print(f"{_extent(experiment)}\n" if len(experiment.problems) > 1 or experiment.exclude else "", flush=True)
    records: list[Record] = []

    def emit(record: Record, traceback: str) -> None:
        records.append(record)
        folder.append(record, traceback)

    interrupted, problem_error = False, None
    try:
        with progress() as shown:
            run_experiment(experiment, name, device, emit, shown)
    except KeyboardInterrupt:
        interrupted = True
    except ProblemError as error:
        if not records:
            raise
        problem_error = error
    Report(records, experiment.published, experiment.size).print(Console())
    print(f"{'interrupted; what was measured is' if interrupted else 'records'} in {folder.path}")
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
