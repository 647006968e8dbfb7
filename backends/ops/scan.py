"""A recurrent layer's states as one op, with a backward pass of a few ops a position.

Gates work on each unit by itself: what a state gains from a gate of its unit, its slope, is one number a unit and gate,
and those of all positions are had at once. From one position to the one before it goes the gradient of the state alone.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = tuple[Tensor, ...]
"""(h,), or (h, c) of an LSTM."""

Gates: TypeAlias = Callable[[Tensor, Tensor, State], State]
"""(what comes of the input, what comes of h, state) -> the next state."""


class Scan(torch.autograd.Function):
    """The states [T, S, N, H] after each of T positions, S of them: h, or h and c.

    `from_hidden` counts as given, though it is made from h: its gradient is that of the gates. The states before are
    known, and what gradient they have by way of `from_hidden` is seen to here.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,  # noqa: ANN401
        gates: Gates,
        w_hidden: Tensor,
        from_input: Tensor,
        from_hidden: Tensor,
        before: Tensor,
        first: Tensor,
    ) -> Tensor:
        ctx.gates, ctx.dtype = gates, first.dtype
        ctx.save_for_backward(w_hidden, from_input, from_hidden, before)
        return torch.stack(gates(from_input, from_hidden, before.unbind(1)), 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # noqa: ANN401, D102
        w_hidden, from_input, from_hidden, before = ctx.saved_tensors
        by_input, by_hidden, by_before = _slopes(ctx.gates, from_input, from_hidden, before)
        w_hidden = w_hidden.to(g.dtype)
        carried, g, gated = torch.zeros_like(g[0]), g.clone(), torch.empty_like(by_hidden[:, 0], dtype=g.dtype)
        for of_state, of_gates, hidden, previous in reversed(list(zip(g, gated, by_hidden, by_before, strict=True))):
            of_state += carried
            torch.sum(hidden * of_state[:, :, None], 0, out=of_gates)
            carried = (previous * of_state[:, None]).sum(0)
            carried[0] += of_gates.flatten(-2) @ w_hidden
        of_input = (by_input * g[:, :, :, None]).sum(1)
        return (
            None,
            None,
            of_input.flatten(-2).to(from_input.dtype),
            gated.flatten(-2).to(from_hidden.dtype),
            None,
            carried.to(ctx.dtype),
        )


def _slopes(gates: Gates, from_input: Tensor, from_hidden: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return d states / d what they come of: both parts of the gates [T, S, N, gates, H], states [T, S, S, N, H]."""
    given = [t.detach().requires_grad_() for t in (from_input, from_hidden, before)]
    with torch.enable_grad():
        states = gates(given[0], given[1], given[2].unbind(1))
        slopes = [
            torch.autograd.grad(state.sum(), given, retain_graph=True, allow_unused=True, materialize_grads=True)
            for state in states
        ]
    by_input, by_hidden, by_before = (torch.stack(each, 1) for each in zip(*slopes, strict=True))
    units = before.shape[-1]
    return by_input.unflatten(-1, (-1, units)), by_hidden.unflatten(-1, (-1, units)), by_before
