"""`python -m testbed frontier`: the largest batch that fits, and the time of a sample on the way there."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text

from backends.base import first_line
from testbed.commands.arguments import directory, names
from testbed.commands.plugins import add_plugin, load_plugins
from testbed.config.experiment import resolve_device
from testbed.config.load import load_experiment
from testbed.config.yaml_source import ConfigError
from testbed.frontier import MOST, PRECISION, Explorer, Frontier, plan
from testbed.jobs import isolated
from testbed.problems import ProblemError
from testbed.processes.child import on_device
from testbed.progress import progress
from testbed.records import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, RecordFile
from testbed.report import draw, units
from testbed.report.terminal import print_table
from testbed.report.titles import title
from testbed.run_folder import RunFolder

FILE = "frontier.jsonl"
ROOM = 65536  # samples at most unless told: what streams never runs out of memory
OBVIOUS = ("oom", MOST, "interrupted")  # ends that need no reason below the table
EPILOG = f"""examples:
  python -m testbed frontier experiments/mnist.yaml --only vmap,bookkeeping
  python -m testbed frontier experiments/mnist.yaml --set limits.memory_gb=2 --set 'quantities=[norms]'
  python -m testbed frontier experiments/published/gpt2.yaml --start 4 --set limits.timeout_s=60

N is doubled until a batch does not fit, then bisected: one {100 * PRECISION:.0f} % larger (or one sample larger)
was tried too and does not fit. Each try has a fresh process, prepares, and calls twice; the second call is timed.
limits.memory_gb bounds a try: on a CPU, left out, it is nine tenths of what is free, on CUDA all that the GPU has.
limits.timeout_s ends a try; there is no bisection then. The experiment's batch_size, train_steps, agreement and
expect are not used: no result is checked here.

exit codes: 0 all searches ended, 2 usage, 3 a backend crashed or raised an error, or not even the first batches fit,
130 interrupted
"""


def main(arguments: Sequence[str]) -> int:
    """Search every frontier of an experiment: progress on stderr, tables on stdout, tries in the run folder."""
    parser = argparse.ArgumentParser(
        prog="python -m testbed frontier",
        description="Find the largest batch that fits, for every problem, quantity and backend of an experiment and "
        "for the ordinary step.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", metavar="EXPERIMENT.yaml", type=Path, help="what to look at")
    parser.add_argument("--out", metavar="DIR", type=directory, help="default: runs/frontier-<name>-<time>")
    parser.add_argument("--most", metavar="N", type=int, default=ROOM, help="the largest batch to try (%(default)s)")
    parser.add_argument("--start", metavar="N", type=int, default=1, help="the first batch to try (%(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="instead of the experiment's")
    parser.add_argument(
        "--only", metavar="NAME,...", type=names, default=[], help="only these backends of the experiment"
    )
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="replace a part of it")
    add_plugin(parser)
    options = parser.parse_args(arguments)
    if not 1 <= options.start <= options.most:
        found = f"found --start {options.start}, --most {options.most}"
        raise ConfigError(f"--start and --most: should be 1 ≤ start ≤ most, {found}")
    load_plugins(options.plugin)
    chosen = [*options.set, *([f"device={options.device}"] if options.device else [])]
    experiment = load_experiment(options.experiment, chosen, options.only)
    device, name = resolve_device(experiment.device), options.experiment.stem
    isolation = on_device(isolated(experiment, options.plugin), device)
    folder = RunFolder.create(options.out or Path("runs") / f"frontier-{name}-{time.strftime('%Y%m%d-%H%M%S')}", FILE)
    folder.describe(experiment, device)
    memory = f"{isolation.memory_gb:g} GB of memory" if isolation.memory_gb else "the device's memory"
    print(f"{name}: {experiment.description.strip() or 'no description'}\ndevice: {device}")
    print(f"a try may take {memory}, {isolation.timeout_s:g} s, and up to {options.most} samples\n", flush=True)
    frontiers, file = plan(experiment, device, options.most), RecordFile(folder.path / FILE, "free some space")
    interrupted, problem_error = False, None
    try:
        with progress() as shown:
            explorer = Explorer(experiment, device, isolation, options.start, file.append, shown)
            for group in _by_problem(frontiers):
                try:
                    explorer.explore(group)
                except ProblemError as error:
                    problem_error = problem_error or error
                    explorer.refuse(group, str(error))
    except KeyboardInterrupt:
        interrupted = True
    if problem_error and not any(f.fitting for f in frontiers):
        raise problem_error
    _show(frontiers, Console())
    _draw(frontiers, folder.path / "figures")
    if problem_error:
        raise problem_error
    print(f"{'interrupted; what was found is' if interrupted else 'tries and figures'} in {folder.path}")
    if interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if any(f.failed for f in frontiers) else EXIT_OK


def _by_problem(frontiers: Sequence[Frontier]) -> list[list[Frontier]]:
    return [list(group) for _, group in groupby(frontiers, key=lambda f: repr(f.problem))]


def _tables(frontiers: Sequence[Frontier]) -> Iterator[tuple[str, list[Frontier]]]:
    """Yield a title and the rows of each problem and quantity, the ordinary step last."""
    for step, *cells in _by_problem(frontiers):
        for quantity in dict.fromkeys(f.quantity for f in cells):
            yield f"{quantity} · {title(step.about)}", [*(f for f in cells if f.quantity == quantity), step]


def _show(frontiers: Sequence[Frontier], console: Console) -> None:
    for heading, rows in _tables(frontiers):
        console.print(Text(heading, style="bold"))
        header = ("backend", "largest N", "stopped by", "best time a sample", "× step's N")
        cells = [(f.label, _largest(f), f.end.status, _best(f), _share(f, rows[-1])) for f in rows]
        ends, drop = ("backend", "stopped by"), ("× step's N", "best time a sample")
        print_table(console, header, cells, left=ends, fold=header[:1], words=ends[1:], drop=drop, gap=1)
        console.print()
        notes: dict[str, list[str]] = {}  # several often end for one reason
        for f in rows:
            if f.end.status not in OBVIOUS:
                notes.setdefault(f"{_at(f)}{f.end.reason}", []).append(f.label)
        for reason, labels in notes.items():
            console.print(Text(f"• {', '.join(labels)}, {reason}"))
        if notes:
            console.print()
    console.print(Text("No result was checked here: `python -m testbed EXPERIMENT.yaml` does that.\n"))


def _at(f: Frontier) -> str:
    return f"N={f.end.n}: " if f.end.n else ""


def _largest(f: Frontier) -> str:
    return f"{'' if f.is_bounded else '≥ '}{f.largest}" if f.largest else "–"


def _best(f: Frontier) -> str:
    return f"{units.seconds(f.best.per_sample_s)} at N={f.best.n}" if f.best else "–"


def _share(f: Frontier, step: Frontier) -> str:
    """Return the largest batch in those of the ordinary step, and on which side of it the truth lies."""
    if not f.largest or not step.largest or not (f.is_bounded or step.is_bounded):
        return "–"
    side = "" if f.is_bounded and step.is_bounded else "≥ " if step.is_bounded else "≤ "
    return side + units.ratio(f.largest / step.largest)


def _draw(frontiers: Sequence[Frontier], folder: Path) -> None:
    """Draw a figure of each table; one that fails does not fail the search, whose tries are safe."""
    tables = [rows for _, rows in _tables(frontiers)]
    colours = draw.colours([f.label for f in frontiers if f.cell])
    for number, rows in enumerate(tables, start=1):
        lines = {f.label: [(t.n, t.per_sample_s or 0.0) for t in f.fitting] for f in rows if f.fitting}
        words = "".join(c if c.isalnum() else "-" for c in rows[0].quantity).strip("-")
        name = f"frontier-{number:02d}-{words}" if len(tables) > 1 else "frontier"
        ends = {f.label: f.end.status for f in rows}
        if not lines:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            draw.save(partial(draw.frontier, lines, ends, colours), folder / name)
        except Exception as error:  # of the disk, of matplotlib, of ours
            print(f"no figure {name}: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
