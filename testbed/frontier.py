"""The frontier: the largest batch that fits, by doubling and then bisection; each try in a process of its own.

Whether results agree is not asked here: `python -m testbed EXPERIMENT.yaml` asks.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch

from backends.base import Unsupported
from testbed.cell import Cell
from testbed.config.experiment import Experiment, Workload
from testbed.jobs import about_problem, problem_of, rule, set_precision
from testbed.problems import Problem, ProblemError
from testbed.processes.child import Child, Isolation
from testbed.processes.host import Failed, Setup
from testbed.progress import Progress
from testbed.records import FAILED, as_line, with_options
from testbed.report.titles import title
from testbed.worker import ORDINARY

PRECISION = 0.05  # a batch that is larger by this share does not fit
CHECKED = 8  # samples at most in the batch that is asked whether every sample has a gradient of its own
FINAL = ("timeout", "unsupported", "unavailable")  # no further try says more; one that times out takes longest, too
MOST = "--most"


@dataclass(frozen=True)
class Try:
    """One try of a batch.

    Attributes:
        n: Samples in the batch, N.
        status: "ok", "problem" (the batch cannot be made: the data end, say), or as in a record.
        reason: Why it is not "ok", in one line.
        prepare_s: Seconds to build the function; None where the try failed, as the next two.
        first_call_s: Seconds of its first call.
        seconds: Seconds of the timed call after it.
    """

    n: int
    status: str = "ok"
    reason: str = ""
    prepare_s: float | None = None
    first_call_s: float | None = None
    seconds: float | None = None

    @property
    def per_sample_s(self) -> float | None:
        """Seconds a sample."""
        return None if self.seconds is None else self.seconds / self.n


@dataclass
class Frontier:
    """The tries of one problem × quantity × backend, or of a problem's ordinary step.

    Attributes:
        problem: The problem, whatever its batch size.
        about: What records say of it.
        cell: What is computed; None for the ordinary step.
        most: The largest batch to try.
        tries: In the order in which they were made.
    """

    problem: Workload
    about: dict[str, Any]
    cell: Cell | None
    most: int
    tries: list[Try] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The row's name."""
        return self.cell.label if self.cell else ORDINARY

    @property
    def quantity(self) -> str:
        """The quantity with its options; empty for the ordinary step."""
        return with_options(self.cell.quantity, self.cell.quantity_options) if self.cell else ""

    @property
    def fitting(self) -> list[Try]:
        """The tries that fitted, the smallest first."""
        return sorted((t for t in self.tries if t.status == "ok"), key=lambda t: t.n)

    @property
    def largest(self) -> int:
        """The largest batch that fitted; 0 where none did."""
        return self.fitting[-1].n if self.fitting else 0

    @property
    def best(self) -> Try | None:
        """The try with the least time a sample."""
        return min(self.fitting, key=lambda t: t.per_sample_s or 0.0, default=None)

    @property
    def end(self) -> Try:
        """What ended the search: the smallest try that failed, or the largest where `most` was reached."""
        stopped = [t for t in self.tries if t.status == "interrupted"]
        if not self.tries or stopped:
            return stopped[0] if stopped else Try(0, "interrupted")
        if self.largest >= self.most:
            return Try(self.largest, MOST)
        return min((t for t in self.tries if t.status != "ok"), key=lambda t: t.n, default=Try(0, "interrupted"))

    @property
    def is_bounded(self) -> bool:
        """Whether a larger batch does not fit; not where something else than the backend's own failure ended it."""
        return self.end.status not in (MOST, "timeout", "problem", "interrupted")

    @property
    def failed(self) -> bool:
        """Whether it ended in a way that nobody looked for: a crash, an error, or nothing that fits."""
        return self.end.status in FAILED and not (self.largest and self.end.status in ("oom", "timeout"))


@dataclass(frozen=True)
class Line:
    """A line of `frontier.jsonl`: a try, and what it is a try of."""

    frontier: Frontier
    found: Try

    def to_json(self) -> str:
        """Return it as one line of JSON."""
        f, cell = self.frontier, self.frontier.cell
        what = {"backend": cell.backend if cell else ORDINARY, "options": cell.options if cell else {}}
        problem = {**f.about, "batch_size": self.found.n}
        tried = {**asdict(self.found), "per_sample_s": self.found.per_sample_s}
        return as_line({"problem": problem, **what, "quantity": f.quantity, **tried})


def search(attempt: Callable[[int], str], start: int, most: int) -> int:
    """Return the largest batch that fits, 0 if none does: doubling until one does not, then bisection in between.

    The result was tried; a batch larger by `PRECISION`, or by one sample, was tried too and does not fit, unless
    `most` was reached or a status of `FINAL` ended the search.

    Args:
        attempt: N → status; "ok" means that it fits.
        start: The first N to try.
        most: The last one.
    """
    largest, n = 0, min(start, most)
    while (status := attempt(n)) == "ok":
        largest, n = n, min(2 * n, most)
        if largest == most:
            return most
    failed = n
    while status not in FINAL and failed - largest > max(1, PRECISION * largest):
        n = (largest + failed) // 2
        status = attempt(n)
        if status == "ok":
            largest = n
        else:
            failed = n
    return largest


def plan(experiment: Experiment, device: torch.device, most: int) -> list[Frontier]:
    """Return the searches of an experiment, none begun: of each problem the ordinary step, then its cells.

    Problems that differ in batch size or training only are one: the batch size is what is searched, and a batch of
    trained weights takes as much room as one of others.
    """
    found: dict[str, list[Frontier]] = {}
    for c in experiment.chosen():
        problem = c.problem.model_copy(update={"train_steps": 0})
        key = repr(problem.model_copy(update={"batch_size": 1}))
        about = {k: v for k, v in about_problem(problem, device).items() if k not in ("batch_size", "train_steps")}
        group = found.setdefault(key, [Frontier(problem, about, None, most)])
        cell = Cell(c.backend.name, c.quantity.name, c.backend.options, c.quantity.options)
        if cell not in [f.cell for f in group]:
            group.append(Frontier(group[0].problem, about, cell, most))
    return [frontier for group in found.values() for frontier in group]


class Explorer:
    """Makes tries.

    Args:
        experiment: The experiment.
        device: Where.
        isolation: What a try may take.
        start: The first batch to try.
        emit: Takes each try the moment it has ended.
        progress: Hears what is going on.
    """

    def __init__(
        self,
        experiment: Experiment,
        device: torch.device,
        isolation: Isolation,
        start: int,
        emit: Callable[[Line], None],
        progress: Progress,
    ) -> None:
        self._rule, self._device, self._isolation, self._start = rule(experiment.agreement), device, isolation, start
        self._emit, self._progress = emit, progress

    def explore(self, group: Sequence[Frontier]) -> None:
        """Search the frontiers of one problem.

        Raises:
            ProblemError: The problem cannot be made.
            KeyboardInterrupt: Again, after the try that was running has been written down.
        """
        self._progress.begin(f"{title(group[0].about)}: does every sample have a gradient of its own?", 0)
        refusal = self._refusal(group[0].problem)
        if refusal:
            self.refuse(group, refusal)
            return
        for f in group:
            self._progress.begin(", ".join(filter(None, (f.quantity, f.label))), 0)
            search(partial(self._try, f), self._start, f.most)

    def refuse(self, group: Sequence[Frontier], reason: str) -> None:
        """Write down that there is nothing to try: the problem cannot be made, or has no per-sample gradients."""
        for f in group:
            self._note(f, Try(0, "unsupported", reason))

    def _refusal(self, problem: Workload) -> str:
        """Return why the problem has no per-sample gradients; empty where it has."""
        with closing(self._child(problem, min(problem.batch_size, CHECKED))) as child:
            try:
                child.check()
            except Unsupported as error:
                return f"the problem: {error}"
            except Failed:
                return ""  # each try shows by itself what is wrong
        return ""

    def _try(self, f: Frontier, n: int) -> str:
        self._progress.step(f"N={n}")
        try:
            with closing(self._child(f.problem, n)) as child:
                found = Try(n, **asdict(child.attempt(f.cell)))
        except Failed as failed:
            found = Try(n, failed.status, failed.reason)
        except ProblemError as error:
            found = Try(n, "problem", str(error))
        except KeyboardInterrupt:
            self._note(f, Try(n, "interrupted", "stopped by Ctrl-C or a signal"))
            raise
        self._note(f, found)
        return found.status

    def _note(self, f: Frontier, found: Try) -> None:
        f.tries.append(found)
        self._emit(Line(f, found))

    def _child(self, problem: Workload, n: int) -> Child:
        make = partial(_make, problem.model_copy(update={"batch_size": n}), self._device)
        return Child(Setup(make, problem.seed, self._rule), self._isolation)


def _make(problem: Workload, device: torch.device) -> Problem:
    """Make a problem without its second batch, which only a check needs."""
    set_precision(problem)
    made = problem_of(problem, device)
    return replace(made, fresh_inputs=made.inputs, fresh_targets=made.targets)
