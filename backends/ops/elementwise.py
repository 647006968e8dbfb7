"""Rules for parameters that are multiplied by, added to, or repeated for, what samples have: scales, shifts, tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.ops.conv import summed
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


@rule(F.prelu, covers=lambda a: a["input"].dim() > 1 or a["weight"].numel() == 1)
def prelu(g: Tensor, input: Tensor, weight: Tensor) -> Pieces:
    """For y = x, or w · x where that is below 0; w is one number, or one a channel."""
    # 0 where x is above 0, as torch's, if g is infinite too; ten times as fast as `where`
    below = torch.ops.aten.threshold_backward(g * input, -input, 0)
    return {"weight": summed(below, g.dim() - 3) if len(weight) > 1 else Dense(below.flatten(1).sum(1, keepdim=True))}


@rewrite(torch.addcmul, Tensor.addcmul, passes=(OVER_THE_BATCH,))
def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """Return x + c · y · z by ops that have rules."""
    return torch.add(input, torch.mul(tensor1, tensor2) * value)


REPEATS = {
    *(Tensor.expand, Tensor.expand_as, Tensor.repeat, Tensor.tile, Tensor.broadcast_to, Tensor.repeat_interleave),
    *(torch.tile, torch.broadcast_to, torch.repeat_interleave),
}
"""Ops that repeat a tensor, for each sample perhaps: the same as to add it to zeros, for which there is a rule."""


def is_repeated(t: Tensor, repeated: Tensor) -> bool:
    """Return whether one of `REPEATS` has done what adding to zeros would do."""
    if repeated.shape == t.shape or repeated.dim() < t.dim():
        return False
    there = repeated.shape[repeated.dim() - t.dim() :]
    return all(a in (1, b) for a, b in zip(t.shape, there, strict=True))
