"""The sweep: cases × backends × quantities in float64. Each cell is right, refused, wrong or an error.

What a backend refuses is run once more *unguarded* (see `backends.base.unguarded`), to know whether the refusal was
needed: the record's `agreement["unguarded"]` says what the library would have returned. A quantity that a backend
derives from `grads` is refused as `grads` is, and not asked again.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch

from backends import backend_class, get_backend, reference, variants
from backends.base import BACKENDS, QUANTITIES, Backend, Unsupported, first_line, unguarded
from backends.registry import UnknownName, unknown
from testbed.agreement import Calibrated
from testbed.cell import Cell, identity, source_hash
from testbed.checks import refuse_without_gradients
from testbed.conformance.case import SEED, Case
from testbed.conformance.layers import layer_cases
from testbed.conformance.models import model_cases
from testbed.environment import environment
from testbed.group import Emit
from testbed.integrity import Snapshot
from testbed.outcome import Outcome
from testbed.problems import Problem
from testbed.problems.base import put
from testbed.progress import Progress, Silent
from testbed.records import SCHEMA, Record
from testbed.referee import Referee
from testbed.truth import telling_max_norm

CPU = torch.device("cpu")
RULE = Calibrated(draws=0)  # the cases are far from kinks in float64: nothing needs an excuse


def all_cases() -> list[Case]:
    """Return every case of the matrix, none of them built."""
    return layer_cases() + model_cases()


def row(layer: str, case: str) -> str:
    """Return the row of the matrix that a case belongs to: its layer, or for a whole model what comes before ":"."""
    return f"model, {case.partition(':')[0]}" if layer == "model" else layer


def choose_cases(pattern: str = "*") -> list[Case]:
    """Return the cases whose row, layer or name a pattern like `Conv*` matches.

    Raises:
        UnknownName: It matches none.
    """
    cases, wanted = all_cases(), pattern.lower()
    found = [
        case
        for case in cases
        if any(fnmatchcase(text.lower(), wanted) for text in (row(case.layer, case.name), case.layer, case.name))
    ]
    if not found:
        raise UnknownName(unknown("layer", pattern, dict.fromkeys(row(case.layer, case.name) for case in cases)))
    return found


def choose_cells(backends: Sequence[str] = (), quantities: Sequence[str] = ("grads",)) -> list[Cell]:
    """Return the cells of a case: every variant of the backends, for each quantity.

    Args:
        backends: Names, for all of a backend's variants, or labels like `opacus(mode=ew)`; all if empty.
        quantities: Names.

    Raises:
        UnknownName: Of a backend or quantity.
    """
    for name in quantities or [""]:
        if name not in QUANTITIES:
            raise UnknownName(unknown("quantity", name, QUANTITIES))
    cells = [Cell(b, q, options) for q in quantities for b, options in variants(q)]
    for name in backends:
        if name in BACKENDS and not any(cell.backend == name for cell in cells):
            computes = ", ".join(BACKENDS[name].quantities)
            raise UnknownName(f"backend '{name}' computes {computes}, not {', '.join(quantities)}")
        if not any(name in (cell.backend, cell.label) for cell in cells):
            raise UnknownName(unknown("backend", name, {cell.backend for cell in cells} | {c.label for c in cells}))
    return [cell for cell in cells if not backends or {cell.backend, cell.label} & set(backends)]


def sweep(
    cases: Sequence[Case],
    cells: Iterable[Cell],
    emit: Emit,
    progress: Progress | None = None,
    *,
    guarded: bool = True,
    device: torch.device = CPU,
) -> None:
    """Run every cell on every case.

    Args:
        cases: The cases.
        cells: Backends and quantities, as `choose_cells` returns them.
        emit: Takes each record, the moment its cell has ended.
        progress: Hears what is going on.
        guarded: Whether backends refuse what their library would get wrong; else what the library returns is judged.
        device: Where they run.
    """
    progress = progress or Silent()
    quantities: dict[str, list[Cell]] = {}
    for cell in cells:
        quantities.setdefault(cell.quantity, []).append(cell)
    for quantity, group in quantities.items():
        progress.begin(f"{quantity}: {len(cases)} cases × {len(group)} backends", len(cases))
        for case in cases:
            progress.step(case.name)
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # the libraries' remarks on each layer; what is wrong shows in the result
                bench = _Bench(case, group[0], guarded, device)
                for cell in group:
                    emit(*bench.record(cell))


class _Bench:
    """One case and quantity: the truth, and what backends return beside it."""

    def __init__(self, case: Case, cell: Cell, guarded: bool, device: torch.device) -> None:
        setup = case.build()
        batch = (setup.inputs, setup.targets)
        self.case, self.guarded = case, guarded
        self.problem = put(Problem(setup.model, setup.loss_fn, *batch, *batch), device)
        self.snapshot = Snapshot(setup.model)
        self.refusal: Outcome | None = None
        self.options: dict[str, Any] = {}
        try:
            refuse_without_gradients(self.problem)
            self.options = _quantity_options(cell.quantity, self.problem)
            self.referee = Referee(self.problem, cell.quantity, self.options, RULE, few=self.problem.n)
            self.referee.truth.exact()
        except Unsupported as error:
            self.refusal = Outcome(status="unsupported", reason=f"the problem: {first_line(error)}")
        except Exception as error:  # then no cell can be judged, and the sweep goes on
            self.refusal = Outcome()
            self.refusal.fail(error)
            self.refusal.reason = f"the truth: {self.refusal.reason}"

    def record(self, cell: Cell) -> tuple[Record, str]:
        """Return what became of a cell, and the traceback of an error or an empty string."""
        start = time.perf_counter()
        outcome = self.refusal or self._judge(cell, self.guarded)
        native = backend_class(cell.backend).native(cell.quantity)
        if self.guarded and native and outcome.status == "unsupported" and not self.refusal:
            raw = self._judge(cell, guarded=False)
            silent = raw.status == "nonfinite" or "same_function" in raw.agreement
            outcome.agreement["unguarded"] = {"status": raw.status, "diagnosis": raw.diagnosis, "silent": silent}
        about = {
            "case": self.case.name,
            "layer": self.case.layer,
            "option": self.case.option,
            "why": self.case.reason,
            "batch_size": self.problem.n,
            "dtype": "float64",
            "device": self.problem.device.type,
            **self.options,
        }
        env = _environment(cell.backend, self.problem.device)
        settings = {"guarded": self.guarded, "rule": asdict(RULE)}
        record = Record(
            cell=identity(cell, about, settings, env),
            experiment="conformance" if self.guarded else "conformance, unguarded",
            problem=about,
            backend=cell.backend,
            options=dict(cell.options),
            quantity=cell.quantity,
            status=outcome.status,
            reason=outcome.reason,
            agreement={"rule": "calibrated", **outcome.agreement},
            diagnosis=outcome.diagnosis,
            phases={"cell_s": time.perf_counter() - start},
            timing={"native": native},
            memory={},
            # the rest is in the run folder's environment.json, once and not in some thousand lines
            environment={key: env[key] for key in ("commit", "versions", "backend_source", "schema")},
        )
        return record, outcome.traceback

    def _judge(self, cell: Cell, guarded: bool) -> Outcome:
        outcome, p = Outcome(), self.problem
        try:
            backend = _backend(cell)
            if not backend.float64:
                raise Unsupported("`model`: this backend has no float64 path, in which the matrix is")
            with _settled(), nullcontext() if guarded else unguarded():
                method: Callable[..., Any] = getattr(backend, cell.quantity)
                result = method(p.model, p.loss_fn, **self.options)(p.inputs, p.targets)
            outcome.take("same_function", self.referee.same_function(result))
        except Exception as error:
            outcome.fail(error)
        if change := self.snapshot.change():
            self.snapshot.restore()
            outcome.status = "disagrees"
            outcome.diagnosis = outcome.reason = f"the backend changed the caller's model: {change}"
        return outcome


def _quantity_options(quantity: str, problem: Problem) -> dict[str, Any]:
    """Return the options under which a quantity shows the most of a case."""
    if quantity != "clipped_sum":
        return {}
    norms = get_backend(reference()).norms(problem.model, problem.loss_fn)(problem.inputs, problem.targets)
    return {"max_norm": telling_max_norm(norms)}


@contextmanager
def _settled() -> Iterator[None]:
    """Give every cell the same random state: a case may draw from it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED + 1)
        yield


_BUILT: dict[tuple[type[Backend], str], Backend] = {}


def _backend(cell: Cell) -> Backend:
    """Return the cell's backend; its library is imported and its options are checked once, not for every case."""
    cls = backend_class(cell.backend)
    if (cls, cell.label) not in _BUILT:
        cls.load()
        _BUILT[cls, cell.label] = get_backend(cell.backend, **cell.options)
    return _BUILT[cls, cell.label]


@cache
def _environment(backend: str, device: torch.device) -> dict[str, Any]:
    """Return the environment of a backend's cells; it is the same for all of a sweep."""
    return {**environment(device), "backend_source": source_hash(backend), "schema": SCHEMA}
