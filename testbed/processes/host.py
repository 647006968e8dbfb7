"""What runs the steps of cells: makes the problem once, then a worker for each quantity. Steps take plain data.

A host may be in this process, or in a child (`testbed.processes.child`) that takes the same steps over a pipe.
"""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from backends.heap import nothing_kept
from backends.shortage import lack_of_memory
from testbed.agreement import Rule
from testbed.attempt import Attempt, attempt
from testbed.cell import Cell
from testbed.checks import Misfit, refuse_without_gradients
from testbed.dropout import random_dropouts, with_masks
from testbed.outcome import Outcome, status_of
from testbed.problems import Problem, ProblemError
from testbed.processes.store import Store
from testbed.timing import Sample
from testbed.worker import Worker

Make = Callable[[], Problem]
"""Makes the problem; where it is made in a child, it is pickled: a function of a module, or a `partial` of one."""


class Failed(Exception):
    """A step has failed: the status of the cell it belongs to, why in one line, and what is known beyond that."""

    def __init__(self, status: str, reason: str, details: str = "") -> None:
        super().__init__(status, reason, details)
        self.status, self.reason, self.details = status, reason, details

    def __str__(self) -> str:
        """Return the reason."""
        return self.reason

    @classmethod
    def of(cls, error: BaseException) -> "Failed":
        """Return what an exception stands for."""
        status, reason = status_of(error)
        return cls(status, reason, "".join(traceback.format_exception(error)) if status == "error" else "")


class Steps(Protocol):
    """The steps of cells, in the order in which they are taken; each may raise `Failed`."""

    def make(self) -> dict[str, Any]:
        """Make the problem; return what records say of it that its names do not."""

    def check(self) -> None:
        """Refuse a problem without per-sample gradients; see `refuse_without_gradients`."""

    def begin(self, quantity: str, options: Mapping[str, Any]) -> None:
        """Begin with a quantity."""

    def truth(self, fresh: bool) -> None:
        """Compute the truth for those who share the store; nothing where there is none."""

    def start(self, cell: Cell) -> Outcome:
        """Import, prepare and call once, and ask whether the result agrees."""

    def again(self, cell: Cell, name: str) -> None:
        """Give a cell another name, for timing only; it is started where it was not."""

    def bounds(self) -> dict[str, Any]:
        """Measure what backends are held against: the ordinary step's memory, the quantity's physical limit."""

    def time(self, name: str) -> Sample:
        """Time one call of a started cell, or of the ordinary step."""

    def finish(self, cell: Cell, outcome: Outcome) -> Outcome:
        """Measure memory, and ask again on fresh data."""


@dataclass(frozen=True)
class Setup:
    """All that a host knows in advance.

    Attributes:
        problem: Makes the problem.
        seed: Of the dropout masks.
        rule: When a result agrees.
        store: What hosts share, where there are several.
    """

    problem: Make
    seed: int
    rule: Rule
    store: Store | None = None


class Host:
    """The steps, taken in this process.

    What they free is kept for `time` only, on a CPU: else it is luck which timed calls pay for fresh memory.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._quantity: tuple[str, dict[str, Any]] | None = None
        self._worker: Worker | None = None

    @nothing_kept()
    def make(self) -> dict[str, Any]:
        """Make the problem; return what records say of it that its names do not.

        Raises:
            ProblemError: It cannot be made.
        """
        _, facts = self._made
        return facts

    @nothing_kept()
    def check(self) -> None:
        """Refuse a problem without per-sample gradients.

        Raises:
            Unsupported: See `refuse_without_gradients`.
            Failed: Model, loss and batch do not fit together; or memory is short, which says nothing of them.
        """
        try:
            refuse_without_gradients(self._made[0])
        except Exception as error:
            if lack_of_memory(error):
                raise Failed.of(error) from error
            if isinstance(error, Misfit):
                details = "".join(traceback.format_exception(error.__cause__ or error))
                raise Failed("error", str(error), details) from error
            raise

    @nothing_kept()
    def begin(self, quantity: str, options: Mapping[str, Any]) -> None:
        """Begin with a quantity; what the one before has built is let go."""
        self._begin(quantity, options)

    def _begin(self, quantity: str, options: Mapping[str, Any]) -> None:
        if self._quantity != (quantity, dict(options)):
            self._quantity, self._worker = (quantity, dict(options)), None
            self._worker = Worker(self._made[0], quantity, options, self.setup.rule, self.setup.store)

    @nothing_kept()
    def truth(self, fresh: bool) -> None:
        """Compute the truth for those who share the store; nothing where there is none."""
        self.worker.referee.share(fresh=fresh)

    @nothing_kept()
    def start(self, cell: Cell) -> Outcome:
        """Import, prepare and call once, and ask whether the result agrees."""
        self._begin(cell.quantity, cell.quantity_options)
        return self.worker.start(cell)

    @nothing_kept()
    def again(self, cell: Cell, name: str) -> None:
        """Give a cell another name, for timing only; it is started where it was not."""
        self._begin(cell.quantity, cell.quantity_options)
        try:
            self.worker.again(cell, name)
        except (Exception, SystemExit) as error:
            raise Failed.of(error) from error

    @nothing_kept()
    def bounds(self) -> dict[str, Any]:
        """Measure what backends are held against: the ordinary step's memory, the quantity's physical limit."""
        try:
            return self.worker.bounds()
        except RuntimeError as error:  # the ordinary step itself does not fit, say
            raise Failed.of(error) from error

    def time(self, name: str) -> Sample:
        """Time one call of a started cell, or of the ordinary step."""
        try:
            return self.worker.time(name)
        except (Exception, SystemExit) as error:
            raise Failed.of(error) from error

    @nothing_kept()
    def finish(self, cell: Cell, outcome: Outcome) -> Outcome:
        """Measure memory, and ask again on fresh data."""
        return self.worker.finish(cell, outcome)

    def attempt(self, cell: Cell | None) -> Attempt:
        """Prepare and call twice, of a cell or (None) of the ordinary step; no other step is needed before it.

        Raises:
            ProblemError: The problem cannot be made, but not for want of memory.
        """
        try:
            return attempt(self._made[0], cell)
        except ProblemError as error:
            if not lack_of_memory(error):
                raise
            raise Failed("oom", f"the batch itself: {error}") from error
        except (Exception, SystemExit) as error:
            raise Failed.of(error) from error

    @property
    def worker(self) -> Worker:
        """The worker of the quantity that was begun."""
        if self._worker is None:
            raise Failed("error", "nothing was begun in this process")
        return self._worker

    @cached_property
    def _made(self) -> tuple[Problem, dict[str, Any]]:
        store = self.setup.store
        return store.kept("problem", self._make, mapped=False) if store else self._make()

    def _make(self) -> tuple[Problem, dict[str, Any]]:
        """Return the problem, with masks in place of dropout, and what records say of that."""
        problem = self.setup.problem()
        if not random_dropouts(problem.model):
            return problem, {}
        masked = with_masks(problem, self.setup.seed)
        return masked, {} if masked is problem else {"dropout": "the same masks for every backend"}
