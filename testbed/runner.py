"""Problem × cells → records: checks, then interleaved timing rounds, then memory and the check again."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from backends import backend_class, reference
from backends.base import Unsupported
from testbed import timing
from testbed.agreement import Rule
from testbed.cell import Cell, identity, source_hash
from testbed.checks import refuse_without_gradients
from testbed.dropout import random_dropouts, with_masks
from testbed.environment import environment
from testbed.problems import Problem
from testbed.records import SCHEMA, Record, with_options
from testbed.worker import ORDINARY, Outcome, Worker

AGAIN = "baseline again"  # the baseline under a second name: what it seems to differ from itself is noise


class Progress(Protocol):
    """Hears what is going on; a bar, plain lines, or nothing."""

    def begin(self, what: str, steps: int) -> None:
        """Say that a piece of work of so many steps begins."""

    def step(self, what: str) -> None:
        """Say that a step begins."""


class Silent:
    """Progress that says nothing."""

    def begin(self, what: str, steps: int) -> None:
        """Say nothing."""

    def step(self, what: str) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Settings:
    """How to run cells: everything that is not problem, backend or quantity.

    Attributes:
        experiment: The experiment's name, for the records.
        rule: When a result agrees.
        rounds: Timing rounds at most.
        max_s: Seconds for the rounds of a quantity.
        warmup: Untimed calls after the first one.
        baseline: The backend that times are divided by.
        seed: Seeds the order within rounds.
    """

    experiment: str
    rule: Rule
    rounds: int = 30
    max_s: float = 20.0
    warmup: int = 1
    baseline: str | None = None
    seed: int = 0


Emit = Callable[[Record, str], None]
"""(record, traceback or "") -> None: called for each record the moment its cell has ended."""


def run(
    make: Callable[[], Problem],
    about: Mapping[str, Any],
    cells: Sequence[Cell],
    settings: Settings,
    emit: Emit,
    progress: Progress | None = None,
) -> None:
    """Run cells on a problem; each becomes one record, whatever happens to it.

    Args:
        make: Makes the problem; it may take long, so it is part of the run.
        about: What the records say of the problem, as plain data; `device` is where it is.
        cells: The cells, in the order of the table.
        settings: How to run them.
        emit: Takes each record.
        progress: Hears what is going on.

    Raises:
        ProblemError: The problem cannot be made.
        KeyboardInterrupt: Again, after what was measured so far has been emitted.
    """
    progress = progress or Silent()
    by_quantity: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        by_quantity.setdefault((cell.quantity, str(dict(cell.quantity_options))), []).append(cell)
    groups = [_Group(dict(about), group, settings, emit, progress) for group in by_quantity.values()]
    try:
        progress.begin("problem", 2)
        progress.step("data, model, training")
        problem = make()
        if random_dropouts(problem.model):
            problem = with_masks(problem, settings.seed)
            for group in groups:
                group.about["dropout"] = "the same masks for every backend"
        progress.step("does every sample have a gradient of its own?")
        refuse_without_gradients(problem)
        for group in groups:
            group.run(problem)
    except Unsupported as error:
        for group in groups:
            group.end_all(Outcome(status="unsupported", reason=f"the problem: {error}"))
    except KeyboardInterrupt:
        for group in groups:
            group.end_all(Outcome(status="interrupted", reason="stopped by Ctrl-C"))
        raise


class _Group:
    """The cells of one quantity, timed together."""

    def __init__(
        self,
        about: dict[str, Any],
        cells: Sequence[Cell],
        settings: Settings,
        emit: Emit,
        progress: Progress,
    ) -> None:
        self.about, self.settings, self.emit, self.progress = about, settings, emit, progress
        self.running = {cell.label: cell for cell in cells}  # what has no record yet
        self.outcomes: dict[str, Outcome] = {}
        self.samples: dict[str, list[timing.Sample]] = {}
        self.limit: dict[str, Any] = {}
        self.stopped_by = ""
        self.quantity = cells[0].quantity
        self.environment = environment(torch.device(about["device"]))
        wanted = settings.baseline or reference()
        self.baseline = next((cell.label for cell in cells if cell.backend == wanted), None)

    def run(self, problem: Problem) -> None:
        """Start every cell, time in rounds those that agree, finish them; each that ends is emitted at once."""
        first = next(iter(self.running.values()))
        worker = Worker(problem, self.quantity, first.quantity_options, self.settings.rule)
        self.progress.begin(f"{self.quantity}: agreement", len(self.running))
        for label, cell in list(self.running.items()):
            self.progress.step(label)
            self.outcomes[label] = worker.start(cell)
            if self.outcomes[label].status != "ok":
                self.end(label)
        if self.running:
            with suppress(RuntimeError):  # no limit where the ordinary step itself does not fit, say
                self.limit = worker.limit()
            self.time(worker)
        self.progress.begin(f"{self.quantity}: memory, and agreement on fresh data", len(self.running))
        for label, cell in list(self.running.items()):
            self.progress.step(label)
            worker.finish(cell, self.outcomes[label])
            self.end(label)

    def time(self, worker: Worker) -> None:
        """Time every running cell, the ordinary step, and the baseline a second time, in shuffled rounds."""
        names = [*self.running, ORDINARY]
        if self.baseline in self.running:
            worker.functions[AGAIN] = worker.functions[self.baseline]
            names.append(AGAIN)
        for name in names:
            for _ in range(self.settings.warmup):
                self.time_once(worker, name)
        self.samples = {name: [] for name in names}
        self.progress.begin(f"{self.quantity}: timing", self.settings.rounds)
        count = 0
        for order in timing.rounds(names, self.settings.rounds, self.settings.max_s, self.settings.seed):
            count += 1
            self.progress.step(f"round {count}")
            for name in order:
                ended = name not in self.running and name not in (ORDINARY, AGAIN)
                if not ended and (sample := self.time_once(worker, name)):
                    self.samples[name].append(sample)
        self.stopped_by = "rounds" if count == self.settings.rounds else "max_s"

    def time_once(self, worker: Worker, name: str) -> timing.Sample | None:
        """Time one call; a cell that fails in it ends."""
        try:
            return worker.time(name)
        except (Exception, SystemExit) as error:
            if name in self.running:
                self.outcomes[name].fail(error)
                self.end(name)
            return None

    def end(self, label: str) -> None:
        """Emit the record of a cell."""
        cell, outcome = self.running[label], self.outcomes.get(label, Outcome())
        env = {**self.environment, "backend_source": source_hash(cell.backend), "schema": SCHEMA}
        record = Record(
            cell=identity(cell, self.about, vars(self.settings), env),
            experiment=self.settings.experiment,
            problem=dict(self.about),
            backend=cell.backend,
            options=dict(cell.options),
            quantity=with_options(cell.quantity, cell.quantity_options),
            status=outcome.status,
            reason=outcome.reason,
            agreement={"rule": type(self.settings.rule).__name__.lower(), **outcome.agreement},
            diagnosis=outcome.diagnosis,
            phases=outcome.phases,
            timing={"native": backend_class(cell.backend).native(cell.quantity), **self.timing(label, outcome)},
            memory=outcome.memory,
            environment=env,
        )
        self.emit(record, outcome.traceback)
        del self.running[label]  # only now: a Ctrl-C in between must not lose the cell

    def end_all(self, outcome: Outcome) -> None:
        """Emit the records of all cells that have none yet, with what is known of them."""
        for label in list(self.running):
            known = self.outcomes.get(label, Outcome())
            self.outcomes[label] = replace(known, status=outcome.status, reason=outcome.reason)
            self.end(label)

    def timing(self, label: str, outcome: Outcome) -> dict[str, Any]:
        """Return what was timed of a cell, as plain data; a result that is wrong gets no ratio."""
        mine = self.samples.get(label)
        if not mine:
            return {}
        found = {**timing.summary(mine), "ratio": None, "ratio_ci": None, "verdict": None, "limit": self.limit}
        found |= {"rounds": len(mine), "stopped_by": self.stopped_by, "baseline": self.baseline}
        ordinary = self.samples[ORDINARY]
        if outcome.status != "ok" or not ordinary:
            return found
        step = timing.relative(mine, ordinary)
        found["ordinary"] = {**timing.summary(ordinary), "ratio": step.value, "ratio_ci": [step.low, step.high]}
        if self.baseline and self.samples.get(self.baseline) and self.samples.get(AGAIN):
            base, again = self.samples[self.baseline], self.samples[AGAIN]
            floor = timing.floor_of(timing.relative(again, base))
            against = timing.relative(mine, base)
            found |= {"ratio": against.value, "ratio_ci": [against.low, against.high], "floor": floor}
            found["verdict"] = "baseline" if label == self.baseline else timing.verdict(against, floor)
        return found
