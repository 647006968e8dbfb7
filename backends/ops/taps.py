"""At each op that a rule covers, a pair: what went in (a), and the gradient of what came out (g).

Where a rule applies, the op gets the parameter itself, without gradient, and a `Tap` behind it keeps a and, in the
backward pass, takes g. Ops are watched, not modules: a weight may be tied, raw or used functionally, and each of its
uses adds its own term. How the passes are run is in `passes.py`.
"""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backends.base import Named
from backends.ops.persample import PerSample
from backends.ops.rules import REWRITES, ROLES, RULES, Op, Rule

SHARED = -1
"""In place of an axis: what went in and came out is the same for all samples."""


class Uncovered(Exception):
    """A rule does not hold, which shows only when its op has run.

    The model itself differentiates through the op (`torch.func.grad`), has statistics of each sample's own, or, in a
    pass over the batch, does not have the samples where they were for others.
    """


@dataclass(eq=False)
class Site:
    """A use of parameters by an op that a rule covers.

    Attributes:
        recorder: Of the pass that it is in.
        rule: The op's.
        arguments: The op's, by name.
        names: The parameters in each role.
        axis: The samples' axis in what goes in and comes out, in a pass over the batch; None under vmap.
    """

    recorder: "Recorder"
    rule: Rule
    arguments: dict[str, Any]
    names: dict[str, str]
    axis: int | None

    def entered(self, x: Tensor, dtype: torch.dtype) -> None:
        """Keep what went in, in the dtype in which the op ran: under autocast that is not the input's."""
        self.arguments["input"] = x.detach()
        self.dtype = dtype if x.is_floating_point() else x.dtype
        self.versions = self._versions()

    def returned(self, g: Tensor) -> None:
        """Take the gradient of what came out, and make of the pair what it is kept as."""
        if not self.recorder.forward_is_over:
            raise Uncovered
        if self._versions() != self.versions:
            raise RuntimeError("what went into an op has been modified by an inplace operation")
        self.arguments["input"] = self.arguments["input"].to(self.dtype)
        if self.axis is not None:  # a sample is a batch of one, as under vmap
            g, self.arguments["input"] = (t.movedim(self.axis, 0)[:, None] for t in (g, self.arguments["input"]))
        for role, piece in self.rule.gradients(g, **self.arguments).items():
            if role in self.names:
                self.recorder.found[self.names[role]].append(piece.compact())
        self.arguments.clear()

    def _versions(self) -> list[int]:
        return [t._version for t in self.arguments.values() if isinstance(t, Tensor)]


class Tap(torch.autograd.Function):
    """The identity on an op's output, which tells its site what went in and, backwards, the output's gradient.

    `token` [N] makes the output differentiable, and a batch, where neither the input nor the weight would. The other
    tensors that the rule reads must be the same for all samples.
    """

    @staticmethod
    def forward(y: Tensor, token: Tensor, x: Tensor, site: Site, *others: Tensor) -> Tensor:  # noqa: D102
        site.entered(x, y.dtype)
        unviewed: Tensor = torch.ops.aten._unsafe_view(y, y.shape)  # for the model may go on in place, not on a view
        return unviewed

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401, D102
        ctx.site = inputs[3]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401, D102
        ctx.site.returned(g)
        return g, *[None] * (len(ctx.needs_input_grad) - 1)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # noqa: ANN401, D102
        raise Uncovered

    @staticmethod
    def vmap(  # noqa: D102
        info: Any,  # noqa: ANN401
        in_dims: Any,  # noqa: ANN401
        y: Tensor,
        token: Tensor,
        x: Tensor,
        site: Site,
        *others: Tensor,
    ) -> tuple[Tensor, int]:
        if any(axis is not None for axis in in_dims[4:]):
            raise Uncovered
        y, x = (
            t.expand(info.batch_size, *t.shape) if axis is None else t.movedim(axis, 0)
            for t, axis in ((y, in_dims[0]), (x, in_dims[2]))
        )
        tapped: Tensor = Tap.apply(y, token, x, site, *others)
        return tapped, 0


class BatchTap(torch.autograd.Function):
    """The same outside of vmap, in the form of a function for which torch does less at each call."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, token: Tensor, x: Tensor, site: Site) -> Tensor:  # noqa: ANN401, D102
        ctx.site = site
        return Tap.forward(y, token, x, site)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401, D102
        ctx.site.returned(g)
        return g, None, None, None


@dataclass
class Recorder(TorchFunctionMode):
    """Taps the ops that rules cover, and puts other ops in the place of some.

    Attributes:
        names: The parameters' names, by the identity of what stands for them.
        values: The parameters themselves, without gradient.
        token: A zero of each sample's own, which has a gradient.
        with_rules: Whether there are rules at all.
        samples: N in a pass over the batch; None under vmap.
        known: The samples' axis at each tap, in a pass over the batch; None where it is to be found.
        found: Per-sample gradients by the uses of each parameter.
        axes: The samples' axis at each tap so far; `SHARED` where nothing belonged to a sample.
    """

    names: dict[int, str]
    values: Named
    token: Tensor
    with_rules: bool = True
    samples: int | None = None
    known: Sequence[int] | None = None
    found: dict[str, list[PerSample]] = field(default_factory=dict)
    axes: list[int] = field(default_factory=list)
    forward_is_over: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.found = {name: [] for name in self.values}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        function, watched = REWRITES.get(func, (None, True))
        if function and (watched or self.samples is None):
            with self if watched else nullcontext():
                result = function(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if self.with_rules and func in RULES and (bound := RULES[func].bind(args, kwargs)):
            names = {role: self.names[p] for role in ROLES if (p := id(bound.arguments.get(role))) in self.names}
            if names:
                return self._tapped(func, bound, names)
        return func(*args, **kwargs)

    def _tapped(self, func: Op, bound: inspect.BoundArguments, names: dict[str, str]) -> Tensor:
        x = bound.arguments["input"]
        bound.arguments.update({role: self.values[name] for role, name in names.items()})
        y = func(*bound.args, **bound.kwargs)
        if self.samples is not None:
            axis = self._axis(x, y, self.samples)
            if axis == SHARED:
                x, y, axis = (*(t.expand(self.samples, *t.shape[1:]) for t in (x, y)), 0)
            seen: Tensor = BatchTap.apply(y, self.token, x, Site(self, RULES[func], dict(bound.arguments), names, axis))
            return seen
        others = [t for k, t in bound.arguments.items() if isinstance(t, Tensor) and k not in ("input", *ROLES)]
        site = Site(self, RULES[func], dict(bound.arguments), names, None)
        tapped: Tensor = Tap.apply(y, self.token, x, site, *others)
        return tapped

    def _axis(self, x: Tensor, y: Tensor, n: int) -> int:
        """Return the samples' axis in what goes into an op and comes out; an axis of one that all share has none."""
        fit = [axis for axis, lengths in enumerate(zip(x.shape, y.shape, strict=False)) if set(lengths) == {n}]
        if n > 1 and x.dim() and y.dim() and len(x) == len(y) == 1:
            fit.append(SHARED)
        count = len(self.axes)
        if self.known is not None:
            fit = [axis for axis in fit if self.known[count : count + 1] == [axis]]
        if not fit:
            raise Uncovered
        self.axes.append(fit[0])
        return fit[0]
