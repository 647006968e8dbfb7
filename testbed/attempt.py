"""One try of a batch: does it fit, and what does a call take? Nothing is held that a user would not hold."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from backends import backend_class, get_backend
from testbed import timing
from testbed.cell import Cell
from testbed.ordinary import ordinary_step
from testbed.problems import Problem


@dataclass(frozen=True)
class Attempt:
    """What a try took that did not fail.

    Attributes:
        prepare_s: Seconds to build the function.
        first_call_s: Seconds of its first call.
        seconds: Seconds of the call after it; see `timing.Sample`.
    """

    prepare_s: float
    first_call_s: float
    seconds: float


def attempt(problem: Problem, cell: Cell | None) -> Attempt:
    """Prepare a cell, call it twice on the whole batch, and return what that took; whatever fails escapes.

    Args:
        problem: The problem, with the batch to try.
        cell: The cell; the ordinary step if None.
    """
    device = problem.device
    if cell is None:
        prepare: Callable[[], Callable[..., object]] = partial(ordinary_step, problem)
    else:
        backend_class(cell.backend).load()  # importing is not preparing
        method = getattr(get_backend(cell.backend, **cell.options), cell.quantity)
        prepare = partial(method, problem.model, problem.loss_fn, **cell.quantity_options)
    start = perf_counter()
    fn = prepare()
    timing.synchronise(device)
    prepared = perf_counter()
    call = partial(fn, problem.inputs, problem.targets)
    call()  # its result is let go: it is not there when the next call needs the room
    timing.synchronise(device)
    called = perf_counter()
    return Attempt(prepared - start, called - prepared, timing.time_once(call, device).seconds)
