"""Rules for parameters that are multiplied by, or added to, what samples have: scales, shifts, norms by hand."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from backends.ops.persample import Dense
from backends.ops.rules import Pieces, rule


def _is_broadcast(arguments: Mapping[str, Any]) -> bool:
    """Return whether a parameter, alone, is repeated for each sample; the output has the input's shape then."""
    x, weight = arguments["input"], arguments["weight"]
    if not isinstance(x, Tensor) or x.dim() <= weight.dim() or not x.is_floating_point():
        return False
    there = x.shape[x.dim() - weight.dim() :]
    return all(size in (1, length) for size, length in zip(weight.shape, there, strict=True))


def _summed(t: Tensor, weight: Tensor) -> Dense:
    """Return what was repeated, summed: [N, rows, ..., *there] as [N, *shape]."""
    shape = len(t), *[1] * (t.dim() - 1 - weight.dim()), *weight.shape
    return Dense(t.sum_to_size(shape).reshape(len(t), *weight.shape))


@rule(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, covers=_is_broadcast, commutes=True)
def mul(g: Tensor, input: Tensor, weight: Tensor) -> Pieces:
    """For y = x · w."""
    return {"weight": _summed(g * input, weight)}


@rule(torch.add, Tensor.add, covers=_is_broadcast, commutes=True)
def add(g: Tensor, input: Tensor, weight: Tensor) -> Pieces:
    """For y = x + w."""
    return {"weight": _summed(g, weight)}
