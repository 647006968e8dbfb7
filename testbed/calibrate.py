"""The check, itself measured: how often it cries wolf, and how small an error it catches.

For many seeds, models, dtypes, random and trained weights: every backend that runs must agree (else a false alarm), and
a gradient with a planted relative error must not (the smallest size that is caught is wanted). Both are counted for
several values of the rule's factor c and number of draws K, so that its defaults follow from a measurement.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from backends import get_backend, reference, variants
from backends.base import Unavailable, Unsupported
from testbed.agreement import (
    Calibrated,
    Cloud,
    Rows,
    as_rows,
    cloud,
    distance,
    most_excused,
    precision_base,
    same_function_base,
    unit_roundoff,
)
from testbed.problems import Problem, make_problem
from testbed.truth import Truth

FACTORS = (2.0, 3.0, 4.0, 6.0, 8.0)
DRAWS = (0, 5, 10, 20)
SIZES = tuple(10.0 ** (-k / 2) for k in range(2, 25))  # planted relative errors, 1e-1 … 1e-12
BATCH = 16

SPECS: dict[str, dict[str, Any]] = {
    "tutorial": {"model": "simple_cnn", "data": "random"},
    "digits": {"model": "simple_cnn", "data": "digits"},
    "group norm": {"model": "group_norm_cnn", "data": "random"},
    "transformer": {"model": "transformer", "data": "tokens"},
    "mlp": {"model": "mlp", "data": "digits"},
}

Plant: TypeAlias = Callable[[Rows, float], Rows]

PLANTED: dict[str, Plant] = {
    "one parameter": lambda g, e: {k: t * (1 + e) if i == 0 else t for i, (k, t) in enumerate(g.items())},
    "one sample": lambda g, e: {k: torch.cat([t[:1] * (1 + e), t[1:]]) for k, t in g.items()},
    "everything": lambda g, e: {k: t * (1 + e) for k, t in g.items()},
}


@dataclass
class Tally:
    """What was counted for one dtype and kind of weights.

    Attributes:
        dtype: The run's dtype, or "float64" for question 1.
        trained: Whether the weights were trained first.
        problems: How many problems were made.
        runs: How many results of backends were judged.
        alarms: False alarms by (factor, draws).
        blamed: False alarms at the defaults: backend, model and seed.
        caught: Smallest planted error that was caught, as all larger ones were: one for each problem, by kind.
    """

    dtype: str
    trained: bool
    problems: int = 0
    runs: int = 0
    alarms: dict[tuple[float, int], int] = field(default_factory=dict)
    blamed: list[str] = field(default_factory=list)
    caught: dict[str, list[float]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return the tally as plain data for JSON."""
        return asdict(self) | {"alarms": [{"factor": c, "draws": k, "count": n} for (c, k), n in self.alarms.items()]}


def calibrate(
    seeds: Sequence[int],
    dtypes: Sequence[str],
    specs: Sequence[str] = tuple(SPECS),
    device: str = "cpu",
    train_steps: int = 20,
    step: Callable[[str], None] = lambda what: None,
    tallies: list[Tally] | None = None,
) -> list[Tally]:
    """Measure the check.

    Args:
        seeds: One problem each, for every model, dtype and kind of weights.
        dtypes: "float32", "bfloat16", "float16", or "float64" for question 1.
        specs: Names in `SPECS`.
        device: Where to run.
        train_steps: Of the trained weights.
        step: Hears what is being measured.
        tallies: An empty list, for a caller who wants what was counted if this is interrupted.
    """
    tallies = [] if tallies is None else tallies
    tallies += [Tally(dtype, trained) for dtype in dtypes for trained in (False, True)]
    for seed in seeds:
        for spec in specs:
            for tally in tallies:
                step(f"seed {seed}, {spec}, {tally.dtype}, {'trained' if tally.trained else 'random'}")
                steps = train_steps if tally.trained else 0
                options = {"seed": seed, "train_steps": steps, "dtype": getattr(torch, tally.dtype), "device": device}
                problem = make_problem(loss="nll", batch_size=BATCH, **SPECS[spec], **options)
                before = deepcopy(tally)
                try:
                    _measure(problem, f"{spec}, seed {seed}", tally)
                except KeyboardInterrupt:
                    vars(tally).update(vars(before))  # half a problem counts for none
                    raise
    return tallies


def _measure(problem: Problem, name: str, tally: Tally) -> None:
    """Count alarms of every backend on a problem, and the smallest planted errors that are caught."""
    bench = _Bench(problem, tally.dtype == "float64")
    tally.problems += 1
    right: Rows | None = None
    for backend, rows in bench.results():
        tally.runs += 1
        error = distance(rows, bench.truth)
        for c in FACTORS:
            for k in DRAWS:
                alarm = not bench.agrees(error, Calibrated(c, k))
                tally.alarms[c, k] = tally.alarms.get((c, k), 0) + alarm
                if alarm and Calibrated(c, k) == Calibrated():
                    tally.blamed.append(f"{backend} on {name}")
        right = right or rows
    for kind, plant in PLANTED.items() if right else ():
        tally.caught.setdefault(kind, []).append(_smallest_caught(bench, right or {}, plant))


def _smallest_caught(bench: "_Bench", right: Rows, plant: Plant) -> float:
    """Return the smallest of `SIZES` that is caught, by bisection: a larger error is no harder to see."""
    low, high = 0, len(SIZES)
    while low < high:
        middle = (low + high) // 2
        if bench.agrees(distance(plant(right, SIZES[middle]), bench.truth), Calibrated()):
            high = middle
        else:
            low = middle + 1
    return SIZES[low - 1] if low else float("inf")


class _Bench:
    """A problem with its truth, what stage 1 allows, and the cloud, each computed once."""

    def __init__(self, problem: Problem, same_function: bool) -> None:
        truth = Truth(problem, "grads", {})
        self.problem = problem
        self.truth = as_rows(truth.exact(), "grads")
        yardsticks = [as_rows(y, "grads") for y in truth.yardsticks()]
        self.base = same_function_base(self.truth) if same_function else precision_base(self.truth, yardsticks)
        u = unit_roundoff(yardsticks[0])
        self.most = most_excused(len(self.base), u)
        self.cloud = _remembering(cloud(self.truth, truth.draws(), u))

    def results(self) -> Iterator[tuple[str, Rows]]:
        """Yield the rows of every backend but the reference that runs here."""
        for name, options in variants("grads"):
            if name == reference():
                continue
            try:
                fn = get_backend(name, **options).grads(self.problem.model, self.problem.loss_fn)
                rows = as_rows(fn(self.problem.inputs, self.problem.targets), "grads")
            except (Unsupported, Unavailable):
                continue
            yield f"{name}{options or ''}", rows

    def agrees(self, error: Tensor, rule: Calibrated) -> bool:
        """Return the rule's answer to a result with this error [R, P]."""
        return bool((rule.decide(error, self.base, self.cloud, self.most)[0] <= 1).all())


def _remembering(distances: Cloud) -> Cloud:
    """Return the cloud with its distances kept: rules that differ in c and K only ask for the same ones."""

    @lru_cache(maxsize=1024)
    def kept(k: int, rows: tuple[int, ...]) -> Tensor:
        return distances(k, torch.tensor(rows, device="cpu"))

    return lambda k, rows: kept(k, tuple(rows.tolist()))
