"""What the contract promises beyond right numbers: results stay, steps are seen, and what is timed is the same call.

Asked of a backend's function when it has been timed.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from backends import get_backend, reference
from backends.base import full_copy
from backends.batch import Batch
from testbed.agreement import Rule, as_rows, norms
from testbed.problems import Problem
from testbed.referee import Referee

Fn = Callable[[Batch, Tensor], Any]

BUFFERS = 4  # calls after which an earlier result must be as it was
LONG = 1.0  # seconds after which fewer calls are made
OTHERWISE, OTHERWISE_COARSELY = 1e-2, 0.2  # of its norm by which the same call's result may differ; in half precision


def digest(result: Any, quantity: str) -> Tensor:  # noqa: ANN401  a result
    """Return what changes with a result: norms, and sums, which know signs."""
    rows = as_rows(result, quantity)
    sums = [t.sum(1, keepdim=True, dtype=torch.float64) for t in rows.values()]
    return torch.cat([norms(rows), *sums], 1).nan_to_num()


def is_reused(kept: Any, before: Tensor, quantity: str, more: Callable[[], object]) -> bool:  # noqa: ANN401  a result
    """Return whether an earlier result, whose digest is known, changes in further calls."""
    start = time.perf_counter()
    for _ in range(BUFFERS):  # that it may use in turn
        more()
        if time.perf_counter() - start > LONG:
            break
    return not torch.equal(digest(kept, quantity), before)


def differ(shown: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the digests of two results of one call differ by more than what a device may round otherwise."""
    share = OTHERWISE if torch.finfo(dtype).eps < OTHERWISE**2 else OTHERWISE_COARSELY
    return found.shape != shown.shape or bool((found - shown).norm() > share * shown.norm())


class Step:
    """A step of the parameters in place, which later calls must see; whoever moves them puts them back.

    Args:
        few: Samples in float64, and the model that question 1 is asked of.
        quantity: What is computed.
        options: The quantity's.
        rule: When a result agrees.
    """

    def __init__(self, few: Problem, quantity: str, options: Mapping[str, Any], rule: Rule) -> None:
        self.few, self.quantity, self.options, self.rule = few, quantity, options, rule
        self.referee: Referee | None = None

    def unseen_by(self, fn: Fn) -> str:
        """Return what is wrong with a result of the few samples after a step; an empty string if nothing is."""
        if self.referee is None:
            moved = replace(self.few, model=full_copy(self.few.model))
            _move(moved.model)
            self.referee = Referee(moved, self.quantity, self.options, self.rule)
        _move(self.few.model)
        batch = self.few.inputs, self.few.targets
        finding = self.referee.same_function(fn(*batch), lambda: fn(*batch))
        return finding.diagnosis if finding.status != "ok" else ""

    def leaves(self, fn: Fn, problem: Problem) -> bool:
        """Return whether results stay the same after a step, though the reference's do not: all that float32 tells."""

        def found(fn: Fn) -> Tensor:  # NaN equals itself here
            return norms(as_rows(fn(problem.inputs, problem.targets), self.quantity)).nan_to_num()

        before = found(fn)
        reference_fn = getattr(get_backend(reference()), self.quantity)(problem.model, problem.loss_fn, **self.options)
        _move(problem.model)
        return torch.equal(found(fn), before) and not torch.allclose(found(reference_fn), before, rtol=1e-2)


@torch.no_grad()
def _move(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.mul_(0.75)
