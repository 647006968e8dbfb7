"""The truth of a problem: what the reference backend computes, in float64, in the run's dtype, and perturbed."""

import copy

import torch
from torch import Tensor

from backends import get_backend, reference
from backends.base import LossFn
from backends.batch import Batch, apply, take
from testbed.agreement import Draw, Rows, as_rows
from testbed.problems import Problem

SUBSET = ("grads", "norms")  # quantities where a sample's row depends on that sample only


def compute(problem: Problem, quantity: str, options: dict[str, object], *, fresh: bool = False) -> Rows:
    """Return the reference's rows of a quantity on a problem's batch, or on its fresh one."""
    inputs, targets = batch_of(problem, fresh)
    return _rows(problem.model, problem.loss_fn, inputs, targets, quantity, options)


def draws(problem: Problem, quantity: str, options: dict[str, object], *, fresh: bool = False) -> Draw:
    """Return the function that draws the reference's rows at inputs and parameters moved by a few roundings."""
    inputs, targets = batch_of(problem, fresh)

    def draw(k: int, size: float, rows: Tensor) -> Rows:
        generator = torch.Generator(problem.device).manual_seed(k)

        def moved(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            noise = torch.randn(t.shape, generator=generator, device=t.device, dtype=torch.float64)
            return (t.detach().double() * (1 + size * noise)).to(t.dtype)

        model = copy.deepcopy(problem.model)
        for p in model.parameters():
            p.data = moved(p)
        some = rows if quantity in SUBSET else torch.arange(problem.n, device=problem.device)
        x, y = apply(moved, take(inputs, some)), take(targets, some)
        found = _rows(model, problem.loss_fn, x, y, quantity, options)
        whole = quantity in SUBSET or len(next(iter(found.values()))) == 1
        return found if whole else {name: t[rows] for name, t in found.items()}

    return draw


def batch_of(problem: Problem, fresh: bool) -> tuple[Batch, Tensor]:
    """Return the problem's batch, or its fresh one."""
    if fresh:
        return problem.fresh_inputs, problem.fresh_targets
    return problem.inputs, problem.targets


def _rows(
    model: torch.nn.Module, loss_fn: LossFn, inputs: Batch, targets: Tensor, quantity: str, options: dict[str, object]
) -> Rows:
    fn = getattr(get_backend(reference()), quantity)(model, loss_fn, **options)
    return as_rows(fn(inputs, targets), quantity)
