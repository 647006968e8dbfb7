"""The cells of one quantity: checks, then interleaved timing rounds, then memory and the check again."""

import os
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from backends import backend_class, reference
from testbed import timing
from testbed.cell import Cell, identity
from testbed.disturbances import Watch
from testbed.outcome import Outcome
from testbed.processes.child import Isolation
from testbed.processes.host import Failed
from testbed.processes.hosts import HOUSE, Hosts
from testbed.processes.shield import shielded
from testbed.progress import Progress
from testbed.records import FAILED, Record, with_options
from testbed.settings import Settings, surroundings
from testbed.worker import ORDINARY

AGAIN = "baseline again"  # the baseline by another host: what it seems to differ from itself is noise

Emit = Callable[[Record, str], None]
"""(record, traceback or "") -> None: called for each record the moment its cell has ended."""


class Group:
    """The cells of one quantity, timed together."""

    def __init__(
        self,
        about: dict[str, Any],
        cells: Sequence[Cell],
        settings: Settings,
        emit: Emit,
        progress: Progress,
        isolation: Isolation | None,
        finished: Container[str],
    ) -> None:
        self.about, self.settings, self.emit, self.progress = about, settings, emit, progress
        self.environments = {cell.label: surroundings(cell, about, isolation) for cell in cells}
        self.identities = {c.label: identity(c, about, vars(settings), self.environments[c.label]) for c in cells}
        self.running = {c.label: c for c in cells if self.identities[c.label] not in finished}  # have no record yet
        self.outcomes: dict[str, Outcome] = {}
        self.samples: dict[str, list[timing.Sample]] = {}
        self.bounds: dict[str, Any] = {}
        self.stopped_by = ""
        self.disturbances: list[str] = []
        self.lost: set[str] = set()  # names beside the cells that can be timed no more
        self.losses: list[str] = []  # the same with the reasons
        self.quantity, self.quantity_options = cells[0].quantity, cells[0].quantity_options
        wanted = settings.baseline or reference()
        baseline = next((cell for cell in cells if cell.backend == wanted), None)
        self.baseline = baseline.label if baseline else None
        self.companion: str | None = None
        if baseline and self.running and baseline.label not in self.running:
            self.companion = baseline.label  # has its record, and runs again: a ratio needs both in the same rounds
            self.running[baseline.label] = baseline

    def labels(self) -> list[str]:
        """Return the labels of the hosts that are needed beside the house."""
        return [*self.running, *([AGAIN] if self.baseline in self.running else [])]

    def run(self, hosts: Hosts) -> None:
        """Start every cell, time in rounds those that agree, finish them; each that ends is emitted at once."""
        self.progress.begin(f"{self.quantity}: agreement", len(self.running))
        with suppress(Failed):  # without a truth of all, each computes its own, and fails by itself where that fails
            hosts[HOUSE].begin(self.quantity, self.quantity_options)
            hosts[HOUSE].truth(fresh=False)
        for label, cell in list(self.running.items()):
            self.progress.step(label)
            self.step(hosts, label, partial(hosts[label].start, cell))
        if self.running:
            with suppress(Failed):
                self.bounds = hosts[HOUSE].bounds()
            self.time(hosts)
            with suppress(Failed):
                hosts[HOUSE].truth(fresh=True)
        self.progress.begin(f"{self.quantity}: memory, and agreement on fresh data", len(self.running))
        for label in sorted(self.running, key=lambda label: label != self.baseline):  # a wrong one is no yardstick
            cell = self.running[label]
            self.progress.step(label)
            self.step(hosts, label, partial(hosts[label].finish, cell, self.outcomes[label]))
            if label in self.running:
                self.end(label)

    def step(self, hosts: Hosts, label: str, work: Callable[[], Outcome]) -> None:
        """Take a step of a cell, which ends if the step does not end well."""
        try:
            self.outcomes[label] = work()
        except Failed as failed:
            self.fail(label, failed)
        if self.outcomes[label].status != "ok":
            if self.outcomes[label].status in FAILED:
                hosts.discard(label)
            self.end(label)

    def fail(self, label: str, failed: Failed) -> None:
        """Write down that a step of a cell has failed."""
        known = self.outcomes.get(label, Outcome())
        wrong = failed.reason if failed.status == "disagrees" else known.diagnosis
        self.outcomes[label] = replace(
            known, status=failed.status, reason=failed.reason, diagnosis=wrong, traceback=failed.details
        )

    def time(self, hosts: Hosts) -> None:
        """Time every running cell, the ordinary step, and the baseline a second time, in shuffled rounds."""
        names = [*self.running, ORDINARY]
        if self.baseline in self.running:
            names.append(AGAIN)
            try:
                hosts[AGAIN].again(self.running[self.baseline], AGAIN)
            except Failed as failed:
                hosts.discard(AGAIN)
                self.lose(AGAIN, failed)
        for name in names:
            for _ in range(self.settings.warmup):
                self.time_once(hosts, name)
        self.samples = {name: [] for name in names}
        self.progress.begin(f"{self.quantity}: timing", self.settings.rounds, self.settings.max_s)
        watch = Watch(torch.device(self.about["device"]), [os.getpid(), *hosts.pids()])
        count, self.stopped_by = 0, ""
        for order in timing.rounds(names, self.settings.rounds, self.settings.max_s, self.settings.seed):
            count += 1
            self.progress.step(f"round {count}")
            watch.look()
            for name in order:
                if sample := self.time_once(hosts, name):
                    self.samples[name].append(sample)
            if self.is_precise():
                self.stopped_by = "precision"
                break
        self.stopped_by = self.stopped_by or ("rounds" if count == self.settings.rounds else "max_s")
        self.disturbances = [*watch.sentences(), *self.losses]

    def lose(self, name: str, failed: Failed) -> None:
        """Write down that what is timed beside the cells can be timed no more."""
        self.lost.add(name)
        what = f"the second {self.baseline}, which shows the noise," if name == AGAIN else f"the {name}"
        self.losses.append(f"{what} could be timed no more: {failed.status}: {failed.reason}")

    def is_precise(self) -> bool:
        """Return whether the ratios are known well enough for no more rounds to be needed."""
        names = [*self.running, *({ORDINARY, AGAIN} - self.lost)]
        mine = {name: self.samples[name] for name in names if self.samples.get(name)}
        against = self.baseline if self.baseline in mine else ORDINARY
        return against in mine and timing.precise(mine, against, self.settings.precision)

    def time_once(self, hosts: Hosts, name: str) -> timing.Sample | None:
        """Time one call; a cell that fails in it ends."""
        beside = name in (ORDINARY, AGAIN)
        if name in self.lost or not (beside or name in self.running):
            return None
        label = HOUSE if name == ORDINARY else name
        try:
            return hosts[label].time(name)
        except Failed as failed:
            hosts.discard(label)
            if beside:
                self.lose(name, failed)
            else:
                self.fail(label, failed)
                self.end(label)
            return None

    def end(self, label: str) -> None:
        """Emit the record of a cell."""
        cell, outcome = self.running[label], self.outcomes.get(label, Outcome())
        record = Record(
            cell=self.identities[label],
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
            timing={"native": backend_class(cell.backend).way(cell.quantity), **self.timing(label, outcome)},
            memory=outcome.memory,
            environment={**self.environments[label], "disturbances": self.disturbances},
        )
        with shielded():  # the record is written and crossed off, or neither
            if label != self.companion:
                self.emit(record, outcome.traceback)
            del self.running[label]

    def end_all(self, outcome: Outcome) -> None:
        """Emit the records of all cells that have none yet, with what is known of them."""
        for label in list(self.running):
            known = self.outcomes.get(label, Outcome())
            self.outcomes[label] = replace(
                known, status=outcome.status, reason=outcome.reason, traceback=outcome.traceback
            )
            self.end(label)

    def timing(self, label: str, outcome: Outcome) -> dict[str, Any]:
        """Return what was timed of a cell, as plain data; a result that is wrong gets no ratio."""
        mine = self.samples.get(label)
        if not mine:
            return {}
        found = {**timing.summary(mine), "ratio": None, "ratio_ci": None, "verdict": None}
        found["limit"] = self.bounds.get("limit", {})
        found |= {"rounds": len(mine), "stopped_by": self.stopped_by, "baseline": self.baseline}
        ordinary = self.samples[ORDINARY]
        if outcome.status != "ok" or not ordinary:
            return found
        step = timing.relative(mine, ordinary)
        found["ordinary"] = {**timing.summary(ordinary), "ratio": step.value, "ratio_ci": [step.low, step.high]}
        found["ordinary"] |= self.bounds.get("memory", {})
        right = self.outcomes.get(self.baseline or "", Outcome()).status == "ok"
        if self.baseline and right and self.samples.get(self.baseline) and self.samples.get(AGAIN):
            base, again = self.samples[self.baseline], self.samples[AGAIN]
            floor = timing.floor_of(timing.relative(again, base))
            against = timing.relative(mine, base)
            found |= {"ratio": against.value, "ratio_ci": [against.low, against.high], "floor": floor}
            found["verdict"] = "baseline" if label == self.baseline else timing.verdict(against, floor)
        return found
