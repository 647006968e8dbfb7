"""A recurrent layer's states as one op, with a backward pass that finds the gradients of what goes into its gates.

There are two ways to these. Torch's own kernel gives the gradient of its input: where that is what goes into the gates,
and its weight is the identity, this is what is wanted. It is fast where a state is small; a large one makes for large
products. Else positions are gone through one by one. Gates work on each unit by itself: what a state gains from a gate
of its unit, its slope, is one number a unit and gate, and those of many positions are had at once. From a position to
the one before it goes the state's gradient alone.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from backends.ops.choice import fastest_name

AT_A_TIME = 32
"""Positions whose slopes are there at a time, or an eighth of all if that is more."""

State: TypeAlias = tuple[Tensor, ...]
"""(h,), or (h, c) of an LSTM."""


class Kind(NamedTuple):
    """A kind of recurrent layer.

    Attributes:
        layer: Torch's function.
        given: (what comes of the input, what comes of h) -> what goes into the gates; both, or their sum.
        gates: (what goes into the gates, state) -> the next state.
        of_h: (the gradient of what comes of the input, that, what comes of h) -> the gradient of what comes of h.
    """

    layer: Callable[..., Any]
    given: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    gates: Callable[[tuple[Tensor, ...], State], State]
    of_h: Callable[[Tensor, Tensor, Tensor], Tensor]


class Pass(NamedTuple):
    """A pass through a layer in one direction.

    Attributes:
        kind: The layer's.
        h: The hidden states before each of T positions [T, N, H].
        of_x: What comes of the inputs [T, N, gates·H].
        of_h: What comes of the hidden states [T, N, gates·H].
        first: The first state, each [N, H].
        w_hidden: The weight [gates·H, H] by which h is multiplied.
        b_hidden: And the bias that is added, if there is one.
    """

    kind: Kind
    h: Tensor
    of_x: Tensor
    of_h: Tensor
    first: State
    w_hidden: Tensor
    b_hidden: Tensor | None = None

    @classmethod
    def of(cls, kind: Kind, states: int, h: Tensor, of_x: Tensor, of_h: Tensor, *others: Tensor) -> "Pass":
        """Return the pass of the first state, which is so many tensors, and then the weight, and perhaps the bias."""
        return cls(kind, h, of_x, of_h, others[:states], *others[states:])


class Scan(torch.autograd.Function):
    """The outputs [T, N, H], and of an LSTM the last c [N, H], which torch's kernel has found.

    What gradient a state has by way of the next one is seen to here.
    """

    @staticmethod
    def forward(ctx: Any, kind: Kind, found: list[Tensor], states: int, *tensors: Tensor) -> Any:  # noqa: ANN401, D102
        ctx.kind, ctx.states = kind, states
        ctx.save_for_backward(*tensors)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:  # noqa: ANN401, D102
        run = Pass.of(ctx.kind, ctx.states, *ctx.saved_tensors)
        ways = {"by torch's kernel": _by_kernel, "position by position": _by_position}
        what = f"backward pass of {run.kind.layer.__name__} of {run.h.shape[-1]} units"
        way = ways[fastest_name({k: partial(f, run, g) for k, f in ways.items()}, what, run.h.shape[1], g[0])]
        of_x, of_h, *of_first = way(run, g)
        like = zip((of_x, of_h, *of_first), (run.of_x, run.of_h, *run.first), strict=True)
        without = len(ctx.needs_input_grad) - 4 - len(g) - 2  # the weight, and the bias if there is one
        return *[None] * 4, *(t.to(of.dtype) for t, of in like), *[None] * without


def torchs(kind: Kind, x: Tensor, first: State, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return what torch's kernel finds: the outputs [T, N, H], and of an LSTM the last c [N, H]."""
    with torch._C.DisableTorchFunction(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cuDNN wants the weights of all layers in one piece of memory
        state = [s[None] for s in first]
        train = torch.is_grad_enabled()  # cuDNN has no backward pass else
        y, _, *c = kind.layer(
            x, state if len(state) > 1 else state[0], weights, len(weights) > 2, 1, 0.0, train, False, False
        )
    return [y, *(t[0] for t in c)]


def _by_kernel(run: Pass, g: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of what comes of the inputs and of h, and of the first state."""
    dtype = g[0].dtype
    w_hidden, identity = run.w_hidden.to(dtype), torch.eye(run.of_x.shape[-1], dtype=dtype, device=run.of_x.device)
    weights = [identity, w_hidden]
    if run.b_hidden is not None:
        weights += [torch.zeros_like(run.b_hidden, dtype=dtype), run.b_hidden.to(dtype)]
    finite = run.of_x.detach().to(dtype).clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)  # ∞ · 0 is NaN
    x, *first = (t.detach().to(dtype).requires_grad_() for t in (finite, *run.first))
    with torch.enable_grad():
        found = torchs(run.kind, x, tuple(first), weights)
        of_x, *of_first = torch.autograd.grad(found, [x, *first], [t.to(dtype) for t in g])
    return [of_x, run.kind.of_h(of_x, run.of_x, run.of_h), *of_first]


def _by_position(run: Pass, g: Sequence[Tensor]) -> list[Tensor]:
    """Return the same."""
    given = run.kind.given(run.of_x, run.of_h)
    before = torch.stack([run.h, _memories(given[0], run.first[1])] if len(g) > 1 else [run.h], 1)
    w_hidden, carried = run.w_hidden.to(g[0].dtype), g[0].new_zeros(before.shape[1:])
    of_states = g[0].new_zeros(before.shape)
    of_states[:, 0] = g[0]
    if len(g) > 1:
        of_states[-1, 1] = g[1]
    found = [torch.empty_like(t, dtype=g[0].dtype).unflatten(-1, (-1, before.shape[-1])) for t in given]
    most = max(AT_A_TIME, -(-len(before) // 8))
    for start in reversed(range(0, len(before), most)):
        some = slice(start, start + most)
        *slopes, by_before = _slopes(run.kind, before[some], [t[some] for t in given])
        last = zip(of_states[some], found[-1][some], slopes[-1], by_before, strict=True)
        for of_state, of_gates, by_gates, by_previous in reversed(list(last)):
            of_state += carried
            torch.sum(by_gates * of_state[:, :, None], 0, out=of_gates)
            carried = (by_previous * of_state[:, None]).sum(0)
            carried[0] += of_gates.flatten(-2) @ w_hidden
        for of_gates, by_gates in zip(found[:-1], slopes[:-1], strict=True):
            torch.sum(by_gates.mul_(of_states[some, :, :, None]), 1, out=of_gates[some])
    return [found[0].flatten(-2), found[-1].flatten(-2), *carried]


def _memories(gates: Tensor, c: Tensor) -> Tensor:
    """Return c of an LSTM before each position, from the first one [N, H] and the gates' inputs [T, N, 4·H]."""
    enter, forget, new, _ = gates.chunk(4, -1)
    found = [c]
    for kept, gained in zip(forget[:-1].sigmoid(), enter[:-1].sigmoid() * new[:-1].tanh(), strict=True):
        found.append(torch.addcmul(gained, kept, found[-1]))
    return torch.stack(found)


def _slopes(kind: Kind, before: Tensor, given: list[Tensor]) -> list[Tensor]:
    """Return d states / d what goes into the gates [T, S, N, gates, H], each; d states / d states [T, S, S, N, H]."""
    leaves = [t.detach().requires_grad_() for t in (*given, before)]
    with torch.enable_grad():
        states = kind.gates(tuple(leaves[:-1]), leaves[-1].unbind(1))
        slopes = [
            torch.autograd.grad(state.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            for state in states
        ]
    *by_given, by_before = (torch.stack(each, 1) for each in zip(*slopes, strict=True))
    return [*(t.unflatten(-1, (-1, before.shape[-1])) for t in by_given), by_before]
