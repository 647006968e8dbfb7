"""Recurrent layers in terms of linear ones: vmap has no rule for torch's, and their kernels show no pairs.

The formulas are those of the documentation of `torch.nn.RNN`, `LSTM` and `GRU`. Inputs of all positions go through one
product. Under vmap, so does the hidden state at each position. Over the batch, torch's own kernel finds the hidden
states first; then all of them go through one product, too.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import _VF, Tensor, nn

from backends.ops.rules import OVER_THE_BATCH, UNDER_VMAP, rewrite
from backends.ops.scan import Gates, Scan, State

Run: TypeAlias = Callable[[Tensor, State, Sequence[Tensor], bool], tuple[Tensor, State]]
"""(inputs [T, ...], first state, weights, whether there are biases) -> the outputs [T, ...], the last state."""


class Kind(NamedTuple):
    """A kind of recurrent layer.

    Attributes:
        given: (what comes of the input, what comes of h) -> what goes into the gates; both, or their sum.
        gates: (what goes into the gates, state) -> the next state.
    """

    given: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    gates: Gates


def _sum(x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return (x + h,)


def _both(x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return x, h


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
    "rnn_tanh": Kind(_sum, _tanh),
    "rnn_relu": Kind(_sum, _relu),
    "lstm": Kind(_sum, _lstm),
    "gru": Kind(_both, _gru),
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


def _at_once(
    layer: Callable[..., Any], kind: Kind, x: Tensor, state: State, weights: Sequence[Tensor], has_biases: bool
) -> tuple[Tensor, State]:
    """Run a layer in one direction by torch's kernel and a `Scan`."""
    if len(weights) > 2 + 2 * has_biases:
        return _step_by_step(kind, x, state, weights, has_biases)  # a projection
    w_input, w_hidden, *biases = weights
    b_input, b_hidden = biases or (None, None)
    with torch.no_grad(), torch._C.DisableTorchFunction(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cuDNN wants the weights of all layers in one piece of memory
        first = tuple(s[None] for s in state)
        h, *_ = layer(x, first if len(first) > 1 else first[0], weights, has_biases, 1, 0.0, False, False, False)
        h = torch.cat([first[0].to(h.dtype), h[:-1]])
    given = kind.given(F.linear(x, w_input, b_input), F.linear(h, w_hidden, b_hidden))
    with torch.no_grad():
        before = torch.stack([h, _memories(given[0], state[1])] if len(state) > 1 else [h], 1)
    states = Scan.apply(kind.gates, w_hidden.detach(), before, torch.stack(state), *given)
    return states[:, 0], states[-1].unbind(0)


def _memories(gates: Tensor, c: Tensor) -> Tensor:
    """Return c of an LSTM before each position, from the first one [N, H] and the gates' inputs [T, N, 4·H]."""
    enter, forget, new, _ = gates.chunk(4, -1)
    found = [c]
    for kept, gained in zip(forget[:-1].sigmoid(), enter[:-1].sigmoid() * new[:-1].tanh(), strict=True):
        found.append(torch.addcmul(gained, kept, found[-1]))
    return torch.stack(found)


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
    _layer = getattr(_VF, _name)
    rewrite(_layer, passes=[UNDER_VMAP])(_recurrent(partial(_step_by_step, _kind)))
    rewrite(_layer, passes=[OVER_THE_BATCH])(_recurrent(partial(_at_once, _layer, _kind)))
    rewrite(getattr(_VF, f"{_name}_cell"))(_cell(_kind))
