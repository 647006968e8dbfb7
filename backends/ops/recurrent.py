"""Recurrent layers in terms of linear ones: vmap has no rule for torch's, and their kernels show no pairs.

The formulas are those of the documentation of `torch.nn.RNN`, `LSTM` and `GRU`. Inputs of all positions go through one
product. Under vmap, so does the hidden state at each position. Over the batch, torch's own kernel finds the hidden
states; then all of them go through one product, too, and backwards `Scan` finds the gradients of both products.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import _VF, Tensor, nn

from backends.ops.rules import OVER_THE_BATCH, UNDER_VMAP, rewrite
from backends.ops.scan import Kind, Scan, State, torchs

Run: TypeAlias = Callable[[Tensor, State, Sequence[Tensor], bool], tuple[Tensor, State]]
"""(inputs [T, ...], first state, weights, whether there are biases) -> the outputs [T, ...], the last state."""


def _sum(x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return (x + h,)


def _both(x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return x, h


def _same(g: Tensor, x: Tensor, h: Tensor) -> Tensor:
    return g


def _gru_hidden(g: Tensor, x: Tensor, h: Tensor) -> Tensor:
    *others, new = g.chunk(3, -1)
    reset = (x + h).chunk(3, -1)[0].sigmoid()
    return torch.cat([*others, new * reset], -1)


def _tanh(given: tuple[Tensor, ...], state: State) -> State:
    return (given[0].tanh(),)


def _relu(given: tuple[Tensor, ...], state: State) -> State:
    return (given[0].relu(),)


def _lstm(given: tuple[Tensor, ...], state: State) -> State:
    enter, forget, new, out = given[0].chunk(4, -1)
    c = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return out.sigmoid() * c.tanh(), c


def _gru(given: tuple[Tensor, ...], state: State) -> State:
    (x_reset, x_keep, x_new), (h_reset, h_keep, h_new) = (t.chunk(3, -1) for t in given)
    keep = (x_keep + h_keep).sigmoid()
    new = (x_new + (x_reset + h_reset).sigmoid() * h_new).tanh()
    return ((1 - keep) * new + keep * state[0],)


KINDS = {
    "rnn_tanh": Kind(_VF.rnn_tanh, _sum, _tanh, _same),
    "rnn_relu": Kind(_VF.rnn_relu, _sum, _relu, _same),
    "lstm": Kind(_VF.lstm, _sum, _lstm, _same),
    "gru": Kind(_VF.gru, _both, _gru, _gru_hidden),
}


def _recurrent(run: Run) -> Callable[..., Any]:
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
        if not isinstance(has_biases, bool):
            return NotImplemented  # the signature for packed sequences, which have no samples one can see
        x = input.transpose(0, 1) if batch_first else input
        states = [state] if isinstance(state, Tensor) else list(state)
        directions = 1 + bidirectional
        per_run = len(weights) // (num_layers * directions)
        ends = []
        for depth in range(num_layers):
            sides = []
            for backwards in range(directions):
                place = depth * directions + backwards
                mine = weights[place * per_run : (place + 1) * per_run]
                outputs, end = run(x.flip(0) if backwards else x, tuple(s[place] for s in states), mine, has_biases)
                sides.append(outputs.flip(0) if backwards else outputs)
                ends.append(end)
            x = torch.cat(sides, -1)
            if depth < num_layers - 1:
                x = F.dropout(x, dropout, train)
        return (x.transpose(0, 1) if batch_first else x, *(torch.stack(s) for s in zip(*ends, strict=True)))

    return layer


def _step_by_step(
    kind: Kind, x: Tensor, state: State, weights: Sequence[Tensor], has_biases: bool
) -> tuple[Tensor, State]:
    """Run a layer in one direction by ops that have rules, or that vmap knows."""
    w_input, w_hidden, *more = weights
    b_input, b_hidden = more[:2] if has_biases else (None, None)
    projection = more[2 * has_biases :]
    outputs = []
    for step in F.linear(x, w_input, b_input).unbind(0):
        state = kind.gates(kind.given(step, F.linear(state[0], w_hidden, b_hidden)), state)
        if projection:
            state = (F.linear(state[0], projection[0]), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs), state


def _at_once(kind: Kind, x: Tensor, state: State, weights: Sequence[Tensor], has_biases: bool) -> tuple[Tensor, State]:
    """Run a layer in one direction by torch's kernel and a `Scan`."""
    if len(weights) > 2 + 2 * has_biases:
        return _step_by_step(kind, x, state, weights, has_biases)  # a projection
    w_input, w_hidden, *biases = weights
    b_input, b_hidden = biases or (None, None)
    with torch.no_grad():
        found = torchs(kind, x, state, weights)
        h = torch.cat([state[0][None].to(found[0].dtype), found[0][:-1]])
    of_x, of_h = F.linear(x, w_input, b_input), F.linear(h, w_hidden, b_hidden)
    own = [t.detach() for t in (w_hidden, b_hidden) if t is not None]
    y, *last = Scan.apply(kind, found, len(state), h, of_x, of_h, *state, *own)
    return y, (y[-1], *last)


def _cell(kind: Kind) -> Callable[..., Any]:
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
        given = kind.given(F.linear(input, w_input, b_input), F.linear(before[0], w_hidden, b_hidden))
        after = kind.gates(given, before)
        return after[0] if isinstance(state, Tensor) else after

    return cell


def leave_unflattened(model: nn.Module) -> None:
    """Have a model's recurrent layers leave their weights where they are, until their attributes are set back.

    On CUDA they would put them into one piece of memory at the first sight of new ones; those of vmap have none.
    """
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters = lambda: None  # type: ignore[method-assign]


for _name, _kind in KINDS.items():
    rewrite(_kind.layer, passes=[UNDER_VMAP])(_recurrent(partial(_step_by_step, _kind)))
    rewrite(_kind.layer, passes=[OVER_THE_BATCH])(_recurrent(partial(_at_once, _kind)))
    rewrite(getattr(_VF, f"{_name}_cell"))(_cell(_kind))
