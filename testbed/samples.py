"""A problem's samples: which of them are checked, and what numbers there are of them."""

from dataclasses import replace

import torch
from torch import Tensor

from backends.batch import Batch, size, take
from testbed.problems import Problem


def sizes(problem: Problem) -> dict[str, int]:
    """Return the numbers that a wrong factor may come from, by name."""
    found = {"the batch size": problem.n}
    if problem.targets.dim() > 1:
        tokens = problem.targets[0].numel()
        found |= {"the number of targets a sample": tokens, "the number of targets in the batch": tokens * problem.n}
    return found


def choose(n: int, most: int) -> Tensor | None:
    """Return the indices of a random choice of `most` of n samples, always the same one; None if all are taken."""
    if n <= most:
        return None
    return torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu")[:most].sort().values


def narrow(problem: Problem, index: Tensor) -> Problem:
    """Return the problem with these samples of its batch, and of its fresh one."""
    index = index.to(problem.device)
    again = index[index < size(problem.fresh_inputs)]
    return replace(
        problem,
        inputs=take(problem.inputs, index),
        targets=take(problem.targets, index),
        fresh_inputs=take(problem.fresh_inputs, again),
        fresh_targets=take(problem.fresh_targets, again),
    )


def batch_of(problem: Problem, fresh: bool) -> tuple[Batch, Tensor]:
    """Return the problem's batch, or its fresh one."""
    if fresh:
        return problem.fresh_inputs, problem.fresh_targets
    return problem.inputs, problem.targets
