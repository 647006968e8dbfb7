"""Rules for parameters that are multiplied by, added to, or repeated for, what samples have: scales, shifts, tokens."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backends.ops.persample import Dense
from backends.ops.rules import OVER_THE_BATCH, Pieces, rewrite, rule


def _is_broadcast(arguments: Mapping[str, Any]) -> bool:
    """Return whether a parameter, alone, is repeated for each sample; the output has the input's shape then."""
    x, weight = arguments["input"], arguments["weight"]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    if x.dim() < weight.dim() or (x.dim() == weight.dim() and (x.dim() == 0 or len(weight) > 1)):
        return False
    there = x.shape[x.dim() - weight.dim() :]
    return all(size in (1, length) for size, length in zip(weight.shape, there, strict=True))


def _summed(t: Tensor, weight: Tensor) -> Dense:
    """Return what was repeated, summed: [N, rows, ..., *there] as [N, *shape]."""
    shape = len(t), *[1] * (t.dim() - 1 - weight.dim()), *weight.shape
    return Dense(t.sum_to_size(shape).reshape(len(t), *weight.shape))


def _swapped(args: Sequence[Any]) -> Sequence[Any]:
    """Return the arguments in the other order."""
    return args[::-1]


@rule(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, covers=_is_broadcast, commutes=_swapped)
def mul(g: Tensor, input: Tensor, weight: Tensor) -> Pieces:
    """For y = x · w."""
    return {"weight": _summed(g * input, weight)}


@rule(torch.add, Tensor.add, covers=_is_broadcast, commutes=_swapped)
def add(g: Tensor, input: Tensor, weight: Tensor) -> Pieces:
    """For y = x + w."""
    return {"weight": _summed(g, weight)}


@rewrite(torch.addcmul, Tensor.addcmul, passes=(OVER_THE_BATCH,))
def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """Return x + c · y · z by ops that have rules."""
    return torch.add(input, torch.mul(tensor1, tensor2) * value)


def _repeated(repeat: Callable[..., Tensor], input: Tensor, *sizes: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Repeat what may be made of parameters, for each sample, by an op that has a rule."""
    if not input.requires_grad or (input.dim() > 0 and len(input) > 1):
        return NotImplemented
    found = repeat(input.detach(), *sizes, **kwargs)
    if not _is_broadcast({"input": found, "weight": input}):
        return NotImplemented
    return torch.add(found.new_zeros(found.shape), input)


for op in (Tensor.expand, Tensor.repeat):
    rewrite(op, passes=(OVER_THE_BATCH,))(partial(_repeated, op))
