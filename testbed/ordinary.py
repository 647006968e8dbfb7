"""What training pays, and what torch's own ops make of norms and of weighted losses: as many roundings as it has."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from backends import get_backend, reference
from backends.base import own_copy, trainable
from backends.batch import Batch, call, take
from backends.derived import wide
from testbed.problems import Problem

Step: TypeAlias = Callable[[Batch, Tensor], tuple[Tensor, ...]]


def weighted_gradient(
    problem: Problem, batch: tuple[Batch, Tensor], weights: Tensor, autocast: str | None
) -> dict[str, Tensor]:
    """Return the gradient of Σ w_i ℓ_i by one backward pass, {name: [*shape]}.

    Args:
        problem: Whose model and loss.
        batch: Inputs and targets, [N, ...] each.
        weights: w [N].
        autocast: The dtype to compute in, where it is not the problem's.
    """
    model, (inputs, targets) = own_copy(problem.model), batch
    parameters = trainable(model)
    dtype = getattr(torch, autocast or "float32")
    with torch.enable_grad(), torch.autocast(problem.device.type, dtype, enabled=autocast is not None):
        losses = problem.loss_fn(call(model, inputs), targets)
        total = (losses * weights.to(losses.dtype)).sum()
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def ordinary_norms(problem: Problem, batch: tuple[Batch, Tensor], autocast: str | None) -> Tensor:
    """Return ‖g_i‖ [N] by torch's norm of each parameter's gradient, a sample at a time; arguments as above."""
    grads = get_backend(reference(), autocast=autocast).grads(problem.model, problem.loss_fn)
    inputs, targets = batch
    found = []
    for i in range(len(targets)):
        one = slice(i, i + 1)
        parts = [
            torch.linalg.vector_norm(g, dtype=wide(g.dtype)) for g in grads(take(inputs, one), targets[one]).values()
        ]
        found.append(torch.linalg.vector_norm(torch.stack(parts)))
    return torch.stack(found).to(problem.dtype)


def ordinary_step(problem: Problem) -> Step:
    """Return what plain training pays: the gradient of the batch's summed loss for every trainable parameter."""
    model = own_copy(problem.model)
    parameters = list(trainable(model).values())

    def step(inputs: Batch, targets: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            loss = problem.loss_fn(call(model, inputs), targets).sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return step
