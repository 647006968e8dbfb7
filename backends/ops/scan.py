"""A recurrent layer's states as one op, with a backward pass of a few ops a position.

Gates work on each unit by itself: what a state gains from a gate of its unit, its slope, is one number a unit and
gate, and those of many positions are had at once. From a position to the one before it goes the state's gradient alone.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

AT_A_TIME = 32
"""Positions whose slopes are there at a time, or an eighth of all if that is more."""

State: TypeAlias = tuple[Tensor, ...]
"""(h,), or (h, c) of an LSTM."""

Gates: TypeAlias = Callable[[tuple[Tensor, ...], State], State]
"""(what goes into the gates, state) -> the next state."""


class Scan(torch.autograd.Function):
    """The states [T, S, N, H] after each of T positions, S of them: h, or h and c.

    Of what goes into the gates, `given`, the last tensor is made from h, or holds what is. The states before are known,
    and what gradient they have by way of it is seen to here.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,  # noqa: ANN401
        gates: Gates,
        w_hidden: Tensor,
        before: Tensor,
        first: Tensor,
        *given: Tensor,
    ) -> Tensor:
        ctx.gates, ctx.dtype = gates, first.dtype
        ctx.save_for_backward(w_hidden, before, *given)
        return torch.stack(gates(given, before.unbind(1)), 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # noqa: ANN401, D102
        w_hidden, before, *given = ctx.saved_tensors
        w_hidden, carried, g = w_hidden.to(g.dtype), torch.zeros_like(g[0]), g.clone()
        found = [torch.empty_like(t, dtype=g.dtype).unflatten(-1, (-1, before.shape[-1])) for t in given]
        most = max(AT_A_TIME, -(-len(g) // 8))
        for start in reversed(range(0, len(g), most)):
            some = slice(start, start + most)
            *slopes, by_before = _slopes(ctx.gates, before[some], [t[some] for t in given])
            last = zip(g[some], found[-1][some], slopes[-1], by_before, strict=True)
            for of_state, of_gates, by_gates, by_previous in reversed(list(last)):
                of_state += carried
                torch.sum(by_gates * of_state[:, :, None], 0, out=of_gates)
                carried = (by_previous * of_state[:, None]).sum(0)
                carried[0] += of_gates.flatten(-2) @ w_hidden
            for of_gates, by_gates in zip(found[:-1], slopes[:-1], strict=True):
                torch.sum(by_gates.mul_(g[some, :, :, None]), 1, out=of_gates[some])
        in_dtype = (t.flatten(-2).to(like.dtype) for t, like in zip(found, given, strict=True))
        return None, None, None, carried.to(ctx.dtype), *in_dtype


def _slopes(gates: Gates, before: Tensor, given: list[Tensor]) -> list[Tensor]:
    """Return d states / d what goes into the gates [T, S, N, gates, H], each; d states / d states [T, S, S, N, H]."""
    leaves = [t.detach().requires_grad_() for t in (*given, before)]
    with torch.enable_grad():
        states = gates(tuple(leaves[:-1]), leaves[-1].unbind(1))
        slopes = [
            torch.autograd.grad(state.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            for state in states
        ]
    *by_given, by_before = (torch.stack(each, 1) for each in zip(*slopes, strict=True))
    return [*(t.unflatten(-1, (-1, before.shape[-1])) for t in by_given), by_before]
