"""One forward pass under vmap, one backward pass outside of it, and at each op that a rule covers a pair (a, g).

The model runs under `torch.func.vmap`, so that what belongs to a sample is known by construction, whatever the model
does with its axes. Every trainable parameter is there as N copies, one a sample, which take no memory (stride 0):
autograd differentiates by them wherever no rule applies, and that is right for any op. Where a rule applies, the op
gets the parameter itself, without gradient, and a `Tap` behind it keeps what went in (a) and, in the backward pass,
takes the gradient of what came out (g). Ops are watched, not modules: a weight may be tied, raw or used functionally,
and each of its uses adds its own term.

The backward pass is ordinary autograd over the batch, since vmap is over by then, and makes no weight gradient.
"""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from backends.base import LossFn, Named, Unsupported, trainable
from backends.batch import Batch, apply, call, size
from backends.ops.persample import Dense, PerSample, added
from backends.ops.rules import REWRITES, ROLES, RULES, Op, Rule


class _Uncovered(Exception):
    """A rule does not hold, which shows only when its op has run.

    The model itself differentiates through the op (`torch.func.grad`), or has statistics of each sample's own.
    """


@dataclass(eq=False)
class _Site:
    """A use of parameters by an op that a rule covers.

    Attributes:
        recorder: Of the pass that it is in.
        rule: The op's.
        arguments: The op's, by name.
        names: The parameters in each role.
    """

    recorder: "_Recorder"
    rule: Rule
    arguments: dict[str, Any]
    names: dict[str, str]

    def entered(self, x: Tensor, dtype: torch.dtype) -> None:
        """Keep what went in, in the dtype in which the op ran: under autocast that is not the input's."""
        self.arguments["input"] = x.detach()
        self.dtype = dtype if x.is_floating_point() else x.dtype
        self.versions = self._versions()

    def returned(self, g: Tensor) -> None:
        """Take the gradient of what came out, and make of the pair what it is kept as."""
        if not self.recorder.forward_is_over:
            raise _Uncovered
        if self._versions() != self.versions:
            raise RuntimeError("what went into an op has been modified by an inplace operation")
        self.arguments["input"] = self.arguments["input"].to(self.dtype)
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
    def forward(y: Tensor, token: Tensor, x: Tensor, site: _Site, *others: Tensor) -> Tensor:  # noqa: D102
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
        raise _Uncovered

    @staticmethod
    def vmap(  # noqa: D102
        info: Any,  # noqa: ANN401
        in_dims: Any,  # noqa: ANN401
        y: Tensor,
        token: Tensor,
        x: Tensor,
        site: _Site,
        *others: Tensor,
    ) -> tuple[Tensor, int]:
        if any(axis is not None for axis in in_dims[4:]):
            raise _Uncovered
        y, x = (
            t.expand(info.batch_size, *t.shape) if axis is None else t.movedim(axis, 0)
            for t, axis in ((y, in_dims[0]), (x, in_dims[2]))
        )
        tapped: Tensor = Tap.apply(y, token, x, site, *others)
        return tapped, 0


@dataclass
class _Recorder(TorchFunctionMode):
    """Taps the ops that rules cover, and puts other ops in the place of some.

    Attributes:
        names: The parameters' names, by the identity of what stands for them.
        values: The parameters themselves, without gradient.
        token: A zero of each sample's own, which has a gradient.
        with_rules: Whether there are rules at all.
        found: Per-sample gradients by the uses of each parameter.
    """

    names: dict[int, str]
    values: Named
    token: Tensor
    with_rules: bool
    found: dict[str, list[PerSample]] = field(default_factory=dict)
    forward_is_over: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.found = {name: [] for name in self.values}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func in REWRITES:
            function, watched = REWRITES[func]
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
        others = [t for k, t in bound.arguments.items() if isinstance(t, Tensor) and k not in ("input", *ROLES)]
        tapped: Tensor = Tap.apply(y, self.token, x, _Site(self, RULES[func], dict(bound.arguments), names), *others)
        return tapped


class Passes:
    """Both passes of a model: `passes(inputs, targets)` returns each parameter's g_i, by name.

    Args:
        model: The backend's own copy.
        loss_fn: (outputs [N, ...], targets [N, ...]) -> losses [N].
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.parameters = trainable(model)
        self.values = {name: p.detach() for name, p in self.parameters.items()}
        self.with_rules = True

    def __call__(self, inputs: Batch, targets: Tensor) -> dict[str, PerSample]:
        """Run both passes.

        Raises:
            Unsupported: A parameter was used out of sight.
        """
        try:
            return self._run(inputs, targets)
        except _Uncovered:
            self.with_rules = False
            return self._run(inputs, targets)

    def _run(self, inputs: Batch, targets: Tensor) -> dict[str, PerSample]:
        n = size(inputs)
        copies = {name: p.expand(n, *p.shape).requires_grad_() for name, p in self.values.items()}
        token = next(iter(self.values.values())).new_zeros(n).requires_grad_()
        recorders: list[_Recorder] = []

        def loss(copies: Named, token: Tensor, buffers: Named, inputs: Batch, targets: Tensor) -> Tensor:
            names = {id(p): name for given in (self.parameters, copies) for name, p in given.items()}
            recorder = _Recorder(names, self.values, token, self.with_rules)
            recorders.append(recorder)
            inputs, targets = apply(lambda t: t[None], inputs), apply(lambda t: t[None], targets)
            with recorder:
                outputs = call(lambda *a, **k: functional_call(self.model, (copies, buffers), a, k), inputs)
                return self.loss_fn(outputs, targets).sum()

        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        losses = vmap(loss, (0, 0, None, 0, 0), randomness="different")(copies, token, buffers, inputs, targets)
        (recorder,) = recorders
        recorder.forward_is_over = True
        for name, g in self._backward(losses, token, copies).items():
            recorder.found[name].append(Dense(g))
        return {name: added(recorder.found.pop(name), n, p) for name, p in self.values.items()}

    def _backward(self, losses: Tensor, token: Tensor, copies: Named) -> Named:
        """Run the backward pass, and return the gradients [N, *shape] by the copies that were used outside of rules."""
        if not losses.requires_grad:
            return {}
        wanted = [token, *copies.values(), *self.parameters.values()]
        direct = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)[1:]
        for name, missed in zip(self.parameters, direct[len(copies) :], strict=True):
            if missed is not None:
                raise Unsupported(f"parameter `{name}` is used out of sight, by a reference that the model has kept")
        return {name: g for name, g in zip(copies, direct, strict=False) if g is not None}
