"""What an ordinary backward pass makes of weighted losses: as many roundings as a training step has."""

import torch
from torch import Tensor

from backends.base import own_copy, trainable
from backends.batch import Batch, call
from testbed.problems import Problem


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
