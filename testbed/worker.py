"""Runs the cells of one problem and quantity, a step at a time; every step takes and returns plain data.

The steps of a cell: `start` (import, prepare, first call, both questions), then timed calls by name, then `finish`
(memory, the question again on fresh data). The runner decides the order. Nothing here prints or writes.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backends import backend_class, get_backend
from backends.base import Backend, Unsupported, first_line
from backends.batch import Batch, apply, take, tensors
from testbed import memory, timing
from testbed.agreement import Rule, as_rows
from testbed.cell import Cell
from testbed.compiling import COMPILATIONS
from testbed.integrity import Snapshot
from testbed.ordinary import ordinary_step
from testbed.outcome import Broken, Outcome, listening
from testbed.problems import Problem
from testbed.processes.store import Store
from testbed.promises import Fn, Step, differ, digest, is_reused
from testbed.referee import Referee
from testbed.truth import Truth, telling_max_norm

ORDINARY = "ordinary step"
QUIET = 0.01  # seconds before a call on a CPU: threads of the process that has just been timed go on spinning
SHORT = 0.01  # seconds; a shorter call has an untimed one before it, or waking up is measured (2× at 100 µs)
T = TypeVar("T")


class Worker:
    """Holds one problem, the truth of one quantity, and what the started cells have built.

    Args:
        problem: The problem, on its device and in its dtype.
        quantity: What the cells compute.
        quantity_options: The quantity's options.
        rule: When a result agrees.
        store: What the reference has computed for all processes.
    """

    def __init__(
        self,
        problem: Problem,
        quantity: str,
        quantity_options: Mapping[str, Any],
        rule: Rule,
        store: Store | None = None,
    ) -> None:
        self.problem, self.quantity, self.options, self.rule = problem, quantity, dict(quantity_options), rule
        self.referee = Referee(problem, quantity, quantity_options, rule, store=store)
        self._under_autocast: dict[str, Referee] = {}
        self.recompiles: Counter[str] = Counter()
        self.draws: Counter[str] = Counter()  # of samples for timed calls, by name
        self.shown: dict[str, tuple[int, Tensor]] = {}  # by name, what one timed call returned, and of which draw
        self.of_few: dict[str, Fn] = {}  # by label, the functions that question 1 was asked of
        self.step = Step(self.referee.truth.few, quantity, self.options, rule)
        self.snapshots = [Snapshot.of(problem), Snapshot.of(self.referee.truth.few)]
        self.functions: dict[str, Fn] = {ORDINARY: ordinary_step(problem)}
        self.seconds: dict[str, float] = {}  # of each function's last timed call
        self.timed = apply(torch.clone, problem.inputs), problem.targets.clone()  # rewritten in place by `finish`
        with suppress(RuntimeError):  # what the first call of all pays is nobody's own; a failure shows later
            self.functions[ORDINARY](*self.timed)

    def start(self, cell: Cell) -> Outcome:
        """Import, prepare and call once, and ask whether the result agrees."""
        outcome = Outcome()
        try:
            if _compiles(cell):
                COMPILATIONS.listen()
            cls = backend_class(cell.backend)
            _, outcome.phases["import_s"] = _timed(cls.load)
            backend = get_backend(cell.backend, **cell.options)
            with listening(outcome):
                if self.rule.same_function and cls.float64:
                    self._ask_same_function(cell, backend, outcome)
                first = replace(outcome)
                if outcome.status in ("ok", "disagrees"):  # the whole batch explains best what a few samples showed
                    self._ask_precision(cell, backend, outcome)
                if first.status == "disagrees" and outcome.status == "ok":
                    outcome.status, outcome.reason, outcome.diagnosis = first.status, first.reason, first.diagnosis
        except (Exception, SystemExit) as error:
            outcome.fail(error)
        self._blame_for_changes(outcome)
        self._let_go()
        return outcome

    def again(self, cell: Cell, name: str) -> None:
        """Give a cell a second name to be timed under; one that was not started here is, to have the same past."""
        if cell.label not in self.functions and (reason := self.start(cell).reason):
            raise Broken(reason)
        self.functions[name] = self.functions[cell.label]

    def time(self, name: str) -> timing.Sample:
        """Time one call of a started cell, or of the ordinary step.

        Raises:
            Broken: The call has changed what is not its own. Whatever the call raises escapes too.
        """
        fn, before = self.functions[name], COMPILATIONS.now()
        try:
            with listening():
                if self.problem.device.type == "cpu":
                    time.sleep(QUIET)
                if self.seconds.get(name, 0.0) < SHORT:
                    fn(*self.timed)
                self._redraw(name)
                results: list[Any] = []
                sample = timing.time_once(lambda: results.append(fn(*self.timed)), self.problem.device)
                self.seconds[name] = sample.seconds
                if name != ORDINARY and (draw := self.draws[name]) & (draw - 1) == 0:  # 1, 2, 4, …
                    self.shown[name] = draw, digest(results[0], self.quantity)
                return sample
        finally:
            self.recompiles[name] += COMPILATIONS.since(before)[0]
            if change := self._restore():
                raise Broken(change)

    def finish(self, cell: Cell, outcome: Outcome) -> Outcome:
        """Measure memory, and ask again: on data that the function has not seen, and for the contract's promises."""
        fn, p = self.functions[cell.label], self.problem
        before_finish = COMPILATIONS.now()
        try:
            with listening(outcome):
                backend_class(cell.backend).release()
                outcome.memory = memory.peak(lambda: fn(p.inputs, p.targets), p.device)
                kept = fn(*self._in_place(p.inputs, p.targets))
                before = digest(kept, self.quantity)
                fresh = self._in_place(p.fresh_inputs, p.fresh_targets)
                again = self._referee_of(cell).precision(fn(*fresh), lambda: fn(*fresh), fresh=True)
                outcome.take("again", again)
                if _compiles(cell):
                    recompiled = self.recompiles[cell.label] + COMPILATIONS.since(before_finish)[0]
                    outcome.phases["recompiles"] = recompiled
                if outcome.status != "ok":
                    outcome.diagnosis = outcome.reason = f"after timing, on fresh data: {outcome.diagnosis}"
                elif self._reused(cell, kept, before, lambda: fn(*fresh)):
                    raise Broken("an earlier result changed when the function was called again: it reuses a buffer")
                elif unseen := self._unseen(cell, fn):
                    raise Broken(f"in-place updates of the model's parameters are not seen by later calls: {unseen}")
                elif self._timed_otherwise(cell.label, fn):  # after another batch, whose result may have been kept
                    raise Broken("a timed call returned something else than the same call after timing")
                if choices := get_backend(cell.backend, **cell.options).choices():
                    outcome.phases["choices"] = dict(choices)
        except (Exception, SystemExit) as error:
            outcome.fail(error)
        self._in_place(p.inputs, p.targets)
        self._blame_for_changes(outcome)
        self._let_go()
        return outcome

    def _reused(self, cell: Cell, kept: Any, before: Tensor, more: Callable[[], object]) -> bool:  # noqa: ANN401  a result
        """Return whether an earlier result has changed, of a backend that has not said that it will."""
        if not get_backend(cell.backend, **cell.options).keeps_results:
            return False
        return is_reused(kept, before, self.quantity, more)

    def _timed_otherwise(self, name: str, fn: Fn) -> bool:
        """Return whether a timed call returned something else than the same call does now."""
        if name not in self.shown:
            return False
        draw, shown = self.shown[name]
        return differ(shown, digest(fn(*self._drawn(draw)), self.quantity), self.problem.dtype)

    def _let_go(self) -> None:
        """Give memory back that only the check has needed: others run on the same device."""
        for referee in (self.referee, *self._under_autocast.values()):
            referee.truth.forget()
        if self.referee.truth.store is not None and self.problem.device.type == "cuda":
            with suppress(RuntimeError):  # after an illegal access every call fails; the cell has said so already
                torch.cuda.empty_cache()

    def _redraw(self, name: str) -> None:
        """Let the next call see samples of the batch drawn anew: one that keeps results for the data it knows is slow.

        All that are timed in a round see the same ones.
        """
        self.draws[name] += 1
        self._drawn(self.draws[name])

    def _drawn(self, draw: int) -> tuple[Batch, Tensor]:
        """Return the samples of a draw, in the tensors that are timed."""
        p = self.problem
        drawn = torch.randint(p.n, (p.n,), generator=torch.Generator().manual_seed(draw), device="cpu").to(p.device)
        return self._in_place(take(p.inputs, drawn), p.targets[drawn])

    def _in_place(self, inputs: Batch, targets: Tensor) -> tuple[Batch, Tensor]:
        """Return data written into the very tensors that were timed: results that are kept for a tensor then show."""
        old, new = [*tensors(self.timed[0]), self.timed[1]], [*tensors(inputs), targets]
        if [t.shape for t in old] != [t.shape for t in new]:
            return inputs, targets
        for t, s in zip(old, new, strict=True):
            t.copy_(s)
        return self.timed

    def _unseen(self, cell: Cell, fn: Fn) -> str | None:
        """Return what shows that results do not follow the parameters when these move; None if they do."""
        if change := self._restore():
            raise Broken(change)
        try:
            if of_few := self.of_few.get(cell.label):
                return self.step.unseen_by(of_few) or None
            return "not at all" if self.step.leaves(fn, self.problem) else None
        finally:
            self._restore()

    def bounds(self) -> dict[str, Any]:
        """Measure the ordinary step's memory and the quantity's physical limit on this device, as plain data."""
        step = self.functions[ORDINARY]
        return {"memory": memory.peak(lambda: step(*self.timed), self.problem.device), "limit": self._limit()}

    def _limit(self) -> dict[str, Any]:
        counter = FlopCounterMode(display=False)
        with counter:
            self.functions[ORDINARY](*self.timed)
        rows = as_rows(self.referee.truth.yardsticks()[0], self.quantity)
        written = sum(t.numel() * t.element_size() for t in rows.values()) * self.problem.n // self.referee.truth.run.n
        peak, bandwidth = timing.ceilings(self.problem.device, self.problem.dtype)
        return timing.limit(counter.get_total_flops(), written, peak, bandwidth).plain()

    def _ask_same_function(self, cell: Cell, backend: Backend, outcome: Outcome) -> None:
        """Ask question 1; a library that refuses float64 only is asked the second question all the same."""
        few = self.referee.truth.few
        try:
            fn = getattr(backend, self.quantity)(few.model, few.loss_fn, **self.options)
            result = fn(few.inputs, few.targets)
        except Unsupported as refusal:
            outcome.agreement["no_float64"] = first_line(refusal)
            return
        self.of_few[cell.label] = fn
        outcome.take("same_function", self.referee.same_function(result, lambda: fn(few.inputs, few.targets)))
        if self.quantity == "clipped_sum" and outcome.status == "ok":
            self._ask_with_some_clipped(backend, outcome)

    def _ask_with_some_clipped(self, backend: Backend, outcome: Outcome) -> None:
        """Ask question 1 with a norm that clips some samples: where all are clipped, or none, much else is the same."""
        p, store = self.problem, self.referee.truth.store
        found = Truth(p, "norms", {}, store=store).exact_of_few()
        options = {**self.options, "max_norm": telling_max_norm(cast(Tensor, found))}
        some = Referee(p, self.quantity, options, self.rule, store=store)
        few = some.truth.few
        fn = backend.clipped_sum(few.model, few.loss_fn, **options)
        finding = some.same_function(fn(few.inputs, few.targets), lambda: fn(few.inputs, few.targets))
        if finding.status != "ok":
            what = f"where max_norm={options['max_norm']:.4g} clips some of the samples: {finding.diagnosis}"
            outcome.take("same_function", replace(finding, diagnosis=what))

    def _ask_precision(self, cell: Cell, backend: Backend, outcome: Outcome) -> None:
        p = self.problem
        method = getattr(backend, self.quantity)
        fn, outcome.phases["prepare_s"] = _timed(lambda: method(p.model, p.loss_fn, **self.options), p.device)
        self.functions[cell.label] = fn
        before = COMPILATIONS.now()
        result, seconds = _timed(lambda: fn(p.inputs, p.targets), p.device)
        compiled, compile_s = COMPILATIONS.since(before)
        outcome.phases["first_call_s"] = seconds - compile_s
        if _compiles(cell):
            outcome.phases |= {"compile_s": compile_s, "compiled": compiled}
        referee = self._referee_of(cell)
        outcome.agreement["checked_samples"] = referee.truth.run.n
        outcome.agreement["nondeterminism"] = referee.truth.nondeterminism()
        outcome.take("precision", referee.precision(result, lambda: fn(p.inputs, p.targets)))

    def _referee_of(self, cell: Cell) -> Referee:
        """Return the referee of the cell's arithmetic; under autocast the yardstick runs under it too."""
        autocast = cell.options.get("autocast")
        if not autocast:
            return self.referee
        if autocast not in self._under_autocast:
            referee = Referee(
                self.problem, self.quantity, self.options, self.rule, autocast=autocast, store=self.referee.truth.store
            )
            self._under_autocast[autocast] = referee
        return self._under_autocast[autocast]

    def _restore(self) -> str | None:
        """Return what was changed that is not a backend's own, after putting it back; None if nothing was."""
        changes = [change for snapshot in self.snapshots if (change := snapshot.change())]
        if changes:
            for snapshot in self.snapshots:
                snapshot.restore()
        return f"the backend changed what is the caller's: {changes[0]}" if changes else None

    def _blame_for_changes(self, outcome: Outcome) -> None:
        if change := self._restore():
            outcome.fail(Broken(change))


def _compiles(cell: Cell) -> bool:
    """Return whether a cell's backend is asked to compile, by its options or by default."""
    return get_backend(cell.backend, **cell.options).compile


def _timed(work: Callable[[], T], device: torch.device | None = None) -> tuple[T, float]:
    """Return what something returns and the seconds it takes, the device's share included."""
    start = time.perf_counter()
    result = work()
    if device is not None:
        timing.synchronise(device)
    return result, time.perf_counter() - start
