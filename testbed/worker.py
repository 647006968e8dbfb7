"""Runs the cells of one problem and quantity, a step at a time; every step takes and returns plain data.

The steps of a cell: `start` (import, prepare, first call, both questions), then timed calls by name, then `finish`
(memory, the question again on fresh data). The runner decides the order. Nothing here prints or writes.
"""

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backends import backend_class, get_backend
from backends.base import Unavailable, Unsupported, first_line, own_copy, trainable
from backends.batch import Batch, call
from testbed import diagnosis, memory, reference, timing
from testbed.agreement import PER_SAMPLE, Agreement, Calibrated, Rows, Rule, as_rows
from testbed.cell import Cell
from testbed.integrity import Snapshot
from testbed.problems import Problem

ORDINARY = "ordinary step"
Fn = Callable[[Batch, Tensor], Any]


@dataclass
class Outcome:
    """What is known of a cell so far, as the fields of its record."""

    status: str = "ok"
    reason: str = ""
    diagnosis: str = ""
    agreement: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    traceback: str = ""

    def fail(self, error: BaseException) -> None:
        """Take the status and the reason from an exception."""
        self.status, self.reason = status_of(error)
        self.traceback = "".join(traceback.format_exception(error)) if self.status == "error" else ""


class Worker:
    """Holds one problem, the truth of one quantity, and what the started cells have built.

    Args:
        problem: The problem, on its device and in its dtype.
        quantity: What the cells compute.
        quantity_options: The quantity's options.
        rule: When a result agrees.
    """

    def __init__(self, problem: Problem, quantity: str, quantity_options: Mapping[str, Any], rule: Rule) -> None:
        self.problem, self.quantity, self.options, self.rule = problem, quantity, dict(quantity_options), rule
        self.wide = problem.to(torch.float64)
        self.snapshot = Snapshot(problem.model)
        self.functions: dict[str, Fn] = {ORDINARY: ordinary_step(problem)}
        self._truth: dict[bool, tuple[Rows, Rows]] = {}

    def start(self, cell: Cell) -> Outcome:
        """Import, prepare and call once, and ask whether the result agrees."""
        outcome = Outcome()
        try:
            cls = backend_class(cell.backend)
            outcome.phases["import_s"] = _seconds(cls.load)
            backend = get_backend(cell.backend, **cell.options)
            if self.rule.same_function and cls.float64:
                self._ask_same_function(backend, outcome)
            if outcome.status == "ok":
                self._ask_precision(cell, backend, outcome)
        except Exception as error:
            outcome.fail(error)
        self._blame_for_changes(outcome)
        return outcome

    def time(self, name: str) -> timing.Sample:
        """Time one call of a started cell, or of the ordinary step."""
        fn = self.functions[name]
        inputs, targets = self.problem.inputs, self.problem.targets
        return timing.time_once(lambda: fn(inputs, targets), self.problem.device)

    def finish(self, cell: Cell, outcome: Outcome) -> None:
        """Measure memory, and ask again on data that the function has not seen."""
        fn = self.functions[cell.label]
        try:
            outcome.memory = memory.peak(lambda: fn(self.problem.inputs, self.problem.targets), self.problem.device)
            truth, yardstick = self._truths(fresh=True)
            result = fn(self.problem.fresh_inputs, self.problem.fresh_targets)
            self._judge("again", outcome, result, truth, yardstick, fresh=True)
            if outcome.status != "ok":
                outcome.diagnosis = f"after timing, on fresh data: {outcome.diagnosis}"
                outcome.reason = f"after timing, on fresh data: {outcome.reason}"
        except Exception as error:
            outcome.fail(error)
        self._blame_for_changes(outcome)

    def limit(self) -> dict[str, Any]:
        """Measure the physical limit of the quantity on this device, as plain data."""
        counter = FlopCounterMode(display=False)
        with counter:
            self.functions[ORDINARY](self.problem.inputs, self.problem.targets)
        _, yardstick = self._truths(fresh=False)
        written = sum(t.numel() * t.element_size() for t in yardstick.values())
        peak, bandwidth = timing.ceilings(self.problem.device, self.problem.dtype)
        return timing.limit(counter.get_total_flops(), written, peak, bandwidth).plain()

    def _ask_same_function(self, backend: Any, outcome: Outcome) -> None:  # noqa: ANN401  quantities vary by name
        rule = self.rule if isinstance(self.rule, Calibrated) else Calibrated()
        fn = getattr(backend, self.quantity)(self.wide.model, self.wide.loss_fn, **self.options)
        result = fn(self.wide.inputs, self.wide.targets)
        truth, _ = self._truths(fresh=False)
        draw = reference.draws(self.wide, self.quantity, self.options)

        def judge(rows: Rows) -> Agreement:
            return rule.is_same_function(rows, truth, draw, per_sample=self.quantity in PER_SAMPLE)

        self._answer("same_function", outcome, result, truth, truth, judge)

    def _ask_precision(self, cell: Cell, backend: Any, outcome: Outcome) -> None:  # noqa: ANN401
        problem = self.problem
        built: list[Fn] = []
        results: list[Any] = []
        method = getattr(backend, self.quantity)
        outcome.phases["prepare_s"] = _seconds(
            lambda: built.append(method(problem.model, problem.loss_fn, **self.options)), problem.device
        )
        self.functions[cell.label] = fn = built[0]
        outcome.phases["first_call_s"] = _seconds(
            lambda: results.append(fn(problem.inputs, problem.targets)), problem.device
        )
        truth, yardstick = self._truths(fresh=False)
        self._judge("precision", outcome, results[0], truth, yardstick, fresh=False)

    def _judge(self, key: str, outcome: Outcome, result: Any, truth: Rows, yardstick: Rows, fresh: bool) -> None:  # noqa: ANN401
        draw = reference.draws(self.problem, self.quantity, self.options, fresh=fresh)

        def judge(rows: Rows) -> Agreement:
            return self.rule.judge(rows, truth, yardstick, draw, per_sample=self.quantity in PER_SAMPLE)

        self._answer(key, outcome, result, truth, yardstick, judge)

    def _answer(
        self,
        key: str,
        outcome: Outcome,
        result: Any,  # noqa: ANN401  a backend may return anything
        truth: Rows,
        form: Rows,
        judge: Callable[[Rows], Agreement],
    ) -> None:
        """Hold a result against the truth and put the answer into the outcome."""
        expected = form if isinstance(result, Mapping) or self.quantity not in form else form[self.quantity]
        if self.quantity not in PER_SAMPLE and isinstance(expected, dict):
            expected = {name: t[0] for name, t in expected.items()}
        if wrong := diagnosis.wrong_form(result, expected):
            outcome.status = "disagrees"
            outcome.reason = outcome.diagnosis = wrong
            return
        rows = as_rows(result, self.quantity)
        if bad := diagnosis.nonfinite(rows, truth):
            outcome.status, outcome.reason, outcome.diagnosis = "nonfinite", bad, bad
            return
        answer = judge(rows)
        outcome.agreement[key] = asdict(answer)
        if not answer.agrees:
            outcome.status = "disagrees"
            outcome.diagnosis = diagnosis.explain(rows, truth, self.quantity)
            outcome.reason = outcome.diagnosis

    def _truths(self, fresh: bool) -> tuple[Rows, Rows]:
        """Return the truth (float64) and the yardstick (the run's dtype), computed once."""
        if fresh not in self._truth:
            self._truth.clear()  # two truths of a large problem need not fit together
            self._truth[fresh] = (
                reference.compute(self.wide, self.quantity, self.options, fresh=fresh),
                reference.compute(self.problem, self.quantity, self.options, fresh=fresh),
            )
        return self._truth[fresh]

    def _blame_for_changes(self, outcome: Outcome) -> None:
        change = self.snapshot.change()
        if change is None:
            return
        self.snapshot.restore()
        outcome.status = "disagrees"
        outcome.diagnosis = outcome.reason = f"the backend changed the caller's model: {change}"


def ordinary_step(problem: Problem) -> Fn:
    """Return what plain training pays: the gradient of the batch's summed loss for every trainable parameter."""
    model = own_copy(problem.model)
    parameters = list(trainable(model).values())

    def step(inputs: Batch, targets: Tensor) -> tuple[Tensor, ...]:
        loss = problem.loss_fn(call(model, inputs), targets).sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return step


def status_of(error: BaseException) -> tuple[str, str]:
    """Return the status and the one-line reason that an exception stands for."""
    if isinstance(error, Unsupported):
        return "unsupported", first_line(error)
    if isinstance(error, Unavailable):
        return "unavailable", first_line(error)
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    if out_of_memory:
        return "oom", first_line(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    file = frame.filename.rsplit("/", 1)[-1]
    return "error", f"{type(error).__name__}: {first_line(error)} ({file}:{frame.lineno}, in {frame.name})"


def _seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Return the seconds that something takes, the device's share included."""
    start = time.perf_counter()
    work()
    if device is not None:
        timing.synchronise(device)
    return time.perf_counter() - start
