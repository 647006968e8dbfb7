"""Recurrent layers in terms of linear ones: vmap has no rule for torch's, and their kernels show no pairs.

The formulas are those of the documentation of `torch.nn.RNN`, `LSTM` and `GRU`. Inputs of all positions go through one
product; each position adds one by the hidden state.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import _VF, Tensor

from backends.ops.rules import rewrite

State: TypeAlias = tuple[Tensor, ...]
"""(h,), or (h, c) of an LSTM."""

Gates: TypeAlias = Callable[[Tensor, Tensor, State], State]
"""(what comes of the input, what comes of h, state) -> the next state."""


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).relu(),)


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    enter, forget, new, out = (x + h).chunk(4, -1)
    c = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return out.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (x_reset, x_keep, x_new), (h_reset, h_keep, h_new) = x.chunk(3, -1), h.chunk(3, -1)
    keep = (x_keep + h_keep).sigmoid()
    new = (x_new + (x_reset + h_reset).sigmoid() * h_new).tanh()
    return ((1 - keep) * new + keep * state[0],)


def _recurrent(gates: Gates) -> Callable[..., Any]:
    """Return a layer's function, of the signature of `torch._VF.lstm` and the others."""

    def layer(
        input: Tensor,
        state: Tensor | Sequence[Tensor],
        weights: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:  # noqa: ANN401  a tuple, or NotImplemented
        if not isinstance(batch_first, bool):
            return NotImplemented  # the signature for packed sequences, which have no samples one can see
        x = input.transpose(0, 1) if batch_first else input
        states = [state] if isinstance(state, Tensor) else list(state)
        directions = 1 + bidirectional
        per_run = len(weights) // (num_layers * directions)
        ends = []
        for depth in range(num_layers):
            sides = []
            for backwards in range(directions):
                run = depth * directions + backwards
                mine = weights[run * per_run : (run + 1) * per_run]
                outputs, end = _run(gates, x, tuple(s[run] for s in states), mine, has_biases, bool(backwards))
                sides.append(outputs)
                ends.append(end)
            x = torch.cat(sides, -1)
            if depth < num_layers - 1:
                x = F.dropout(x, dropout, train)
        return (x.transpose(0, 1) if batch_first else x, *(torch.stack(s) for s in zip(*ends, strict=True)))

    return layer


def _run(
    gates: Gates, x: Tensor, state: State, weights: Sequence[Tensor], has_biases: bool, backwards: bool
) -> tuple[Tensor, State]:
    """Return the outputs [T, ...] of one layer in one direction, and its last state."""
    w_input, w_hidden, *more = weights
    b_input, b_hidden = more[:2] if has_biases else (None, None)
    projection = more[2 * has_biases :]
    gated = F.linear(x, w_input, b_input).unbind(0)
    outputs = []
    for step in reversed(gated) if backwards else gated:
        state = gates(step, F.linear(state[0], w_hidden, b_hidden), state)
        if projection:
            state = (F.linear(state[0], projection[0]), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


def _cell(gates: Gates) -> Callable[..., Any]:
    """Return a cell's function, of the signature of `torch._VF.lstm_cell` and the others."""

    def cell(
        input: Tensor,
        state: Tensor | Sequence[Tensor],
        w_input: Tensor,
        w_hidden: Tensor,
        b_input: Tensor | None = None,
        b_hidden: Tensor | None = None,
    ) -> Tensor | State:
        before = (state,) if isinstance(state, Tensor) else tuple(state)
        after = gates(F.linear(input, w_input, b_input), F.linear(before[0], w_hidden, b_hidden), before)
        return after[0] if isinstance(state, Tensor) else after

    return cell


for _name, _gates in {"rnn_tanh": _tanh, "rnn_relu": _relu, "lstm": _lstm, "gru": _gru}.items():
    rewrite(getattr(_VF, _name))(_recurrent(_gates))
    rewrite(getattr(_VF, f"{_name}_cell"))(_cell(_gates))
