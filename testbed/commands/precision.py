"""`python -m testbed precision`: the distribution of errors, backend by backend and dtype by dtype."""

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.text import Text

from testbed.commands.arguments import directory, names
from testbed.commands.plugins import add_plugin, load_plugins
from testbed.config.experiment import resolve_device
from testbed.config.load import load_experiment
from testbed.config.yaml_source import ConfigError
from testbed.jobs import problem_of, set_precision
from testbed.precision import Cancellation, Errors, cancellation, measure
from testbed.progress import progress
from testbed.records import EXIT_FAILED, EXIT_OK, EXIT_WRONG, FAILED, WRONG
from testbed.report.terminal import print_table
from testbed.run_folder import RunFolder

FILE = "precision.json"
DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(arguments: Sequence[str]) -> int:
    """Run the command; exit code 1 where a backend is wrong, else 3 where one fails."""
    parser = argparse.ArgumentParser(
        prog="python -m testbed precision",
        description="Show how far every backend is from the float64 truth, sample by sample, in several dtypes.",
    )
    parser.add_argument("experiment", metavar="EXPERIMENT.yaml", help="whose problem to take")
    parser.add_argument(
        "--dtype", type=names, default="float32,bfloat16", metavar="NAME,...", help="default: %(default)s"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="instead of the experiment's")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="replace a part of it")
    parser.add_argument("--out", type=directory, metavar="DIR", help="default: runs/precision-<time>")
    add_plugin(parser)
    options = parser.parse_args(arguments)
    load_plugins(options.plugin)
    for name in options.dtype:
        if name not in DTYPES:
            raise ConfigError(f"--dtype: unknown dtype '{name}'; available: {', '.join(DTYPES)}")
    chosen = [*options.set, *([f"device={options.device}"] if options.device else [])]
    experiment = load_experiment(options.experiment, chosen)
    if len(experiment.problems) > 1:
        many = f"{options.experiment}: has {len(experiment.problems)} problems, and this command looks at one"
        raise ConfigError(f"{many}; leave one with --set, such as --set batch_size=64")
    (problem,) = experiment.problems
    set_precision(problem)
    device = resolve_device(experiment.device)
    out = options.out or Path("runs") / f"precision-{time.strftime('%Y%m%d-%H%M%S')}"
    kept = RunFolder.create(out, FILE)  # what cannot be kept need not be measured
    lost, found = [cancellation(getattr(torch, name)) for name in options.dtype], list[Errors]()
    try:
        with progress() as shown, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries warn of speed here, which is not measured
            shown.begin("precision", 0)
            chosen_backends = [(c.name, c.options) for c in experiment.backends or ()]
            measure(problem_of(problem, device), options.dtype, chosen_backends or None, shown.step, found)
    finally:  # Ctrl-C loses the backend that is being measured
        if found:
            _show(found, lost, Console())
            _save(found, lost, kept.path)
            print(f"data and picture in {kept.path}")
    codes = {EXIT_WRONG if e.status in WRONG else EXIT_FAILED if e.status in FAILED else EXIT_OK for e in found}
    return next(code for code in (EXIT_WRONG, EXIT_FAILED, EXIT_OK) if code in codes)


def _show(found: Sequence[Errors], lost: Sequence[Cancellation], console: Console) -> None:
    header, rows = ("dtype", "backend", "median", "95 %", "largest", "ill-conditioned"), list[list[str]]()
    for e in found:
        if not e.relative:
            rows.append([e.dtype, e.backend, "–", "–", "–", e.status])
            continue
        ordered = sorted(e.relative)
        p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        ill = ", ".join(map(str, e.ill_conditioned[:4])) + (", …" if len(e.ill_conditioned) > 4 else "")
        rows.append([e.dtype, e.backend, *(f"{x:.1e}" for x in (median(ordered), p95, ordered[-1])), ill or "none"])
    console.print("Error of a sample's gradient, relative to its norm, over the samples of the batch:")
    drop = ("95 %", "median", "ill-conditioned")
    print_table(console, header, rows, left=header[:2], fold=header[1:2], words=header[-1:], drop=drop, gap=1)
    for e in found:
        if e.reason:
            console.print(Text(f"{e.backend} in {e.dtype}: {e.status}: {e.reason}"))
    console.print("\nNorms by Gram, where activations are nearly constant over 1024 positions:")
    for c in lost:
        negative = f"; {c.negative} of 16 squared norms come out negative" if c.negative else ""
        console.print(f"{c.dtype}: off by {c.gram:.1e} of the squared norm, directly by {c.direct:.1e}{negative}")


def _save(found: Sequence[Errors], lost: Sequence[Cancellation], folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")  # no screen is needed
    from matplotlib import pyplot as plt  # a second to import, and only pictures need it

    data = {"errors": [asdict(e) for e in found], "cancellation": [asdict(c) for c in lost]}
    (folder / FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    shown = [e for e in found if e.relative]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.35 * len(shown)), layout="constrained")
    for row, e in enumerate(reversed(shown)):
        floor = [max(x, 1e-18) for x in e.relative]
        axes.plot(floor, [row] * len(floor), "|", ms=12, alpha=0.6, color="C0")
        kinks = [floor[e.samples.index(i)] for i in e.ill_conditioned]
        axes.plot(kinks, [row] * len(kinks), "o", mfc="none", color="C3", label="ill-conditioned" if not row else None)
    axes.set_yticks(range(len(shown)), [f"{e.backend}, {e.dtype}" for e in reversed(shown)])
    axes.set(xscale="log", xlabel="error of a sample's gradient, relative to its norm (circled: ill-conditioned)")
    for ending in ("png", "svg"):
        figure.savefig(folder / f"precision.{ending}", dpi=150)
    plt.close(figure)
