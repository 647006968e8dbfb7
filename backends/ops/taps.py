"""One forward pass under vmap, one backward pass outside of it, and at each op that a rule covers a pair (a, g).

The model runs under `torch.func.vmap`, so that what belongs to a sample is known by construction, whatever the model
does with its axes. Every trainable parameter is there as N equal copies, one a sample, which cost nothing (stride 0):
autograd differentiates by them wherever no rule applies, and that is right for any op. Where a rule does apply, the op
gets the one parameter itself, without gradient, and a `Tap` behind it keeps what went in (a) and, in the backward pass,
the gradient of what came out (g). Ops are watched, not modules: a weight may be tied, raw, or used functionally, and
each of its uses adds its own term.

The backward pass is ordinary autograd over the batch, since vmap is over by then; it makes no weight gradient.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode

from backends.base import LossFn, Named, Unsupported, trainable
from backends.batch import Batch, apply, call, size
from backends.ops.persample import Dense, PerSample, added

Op: TypeAlias = Callable[..., Any]
Pieces: TypeAlias = Mapping[str, PerSample]
ROLES = ("weight", "bias")


@dataclass(frozen=True)
class Rule:
    """What is known of an op that has parameters.

    Attributes:
        gradients: (gradient of the output [N, ...], the op's arguments by name) -> g_i by role, "weight" or "bias".
            `input` is [N, ...], as the model's samples put together.
        signature: The op's.
        covers: Whether the rule holds for these arguments; elsewhere autograd takes over.
    """

    gradients: Callable[..., Pieces]
    signature: inspect.Signature
    covers: Callable[[Mapping[str, Any]], bool]

    def bind(self, args: Any, kwargs: Any) -> inspect.BoundArguments | None:  # noqa: ANN401
        """Return the op's arguments by name; None if they are not those that the rule knows."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        return bound if self.covers(bound.arguments) else None


RULES: dict[Op, Rule] = {}
REWRITES: dict[Op, Op] = {}


def rule(
    *ops: Op, covers: Callable[[Mapping[str, Any]], bool] = lambda arguments: True
) -> Callable[[Callable[..., Pieces]], Callable[..., Pieces]]:
    """Return the decorator that makes a function the rule of some ops; after `g` it has the op's own arguments."""

    def decorate(gradients: Callable[..., Pieces]) -> Callable[..., Pieces]:
        signature = inspect.signature(gradients)
        signature = signature.replace(parameters=[p for name, p in signature.parameters.items() if name != "g"])
        RULES.update(dict.fromkeys(ops, Rule(gradients, signature, covers)))
        return gradients

    return decorate


def rewrite(*ops: Op) -> Callable[[Op], Op]:
    """Return the decorator that makes a function run in place of some ops, in terms of ops that have rules.

    It may return NotImplemented, and then the op runs.
    """

    def decorate(function: Op) -> Op:
        REWRITES.update(dict.fromkeys(ops, function))
        return function

    return decorate


@dataclass(eq=False)
class _Site:
    """A use of parameters by an op that a rule covers."""

    recorder: "_Recorder"
    rule: Rule
    arguments: dict[str, Any]
    names: dict[str, str]  # role -> parameter
    version: int = 0

    def entered(self, x: Tensor, dtype: torch.dtype) -> None:
        """Keep what went in, in the dtype in which the op ran (under autocast it is not the input's)."""
        self.version = x._version
        self.kept = x.detach()
        self.arguments["input"] = self.kept.to(dtype) if x.is_floating_point() else self.kept

    def returned(self, g: Tensor) -> None:
        """Take the gradient of what came out."""
        if not self.recorder.forward_is_over:
            raise Unsupported("the forward pass takes a gradient through an op; only the loss's would be right")
        if self.kept._version != self.version:
            raise RuntimeError("what went into an op has been modified by an inplace operation")
        for role, piece in self.rule.gradients(g, **self.arguments).items():
            if role in self.names:
                self.recorder.found[self.names[role]].append(piece.compact())
        del self.kept, self.arguments


class Tap(torch.autograd.Function):
    """The identity on an op's output, which lets its site know what went in and, backwards, the output's gradient.

    `token` [N] is what makes the output differentiable, and a batch, where neither input nor weight would.
    """

    @staticmethod
    def forward(y: Tensor, token: Tensor, x: Tensor, site: _Site) -> Tensor:  # noqa: D102
        site.entered(x, y.dtype)
        return torch.ops.aten._unsafe_view(y, y.shape)  # no view for autograd, so that it may be modified in place

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401, D102
        ctx.site = inputs[3]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401, D102
        ctx.site.returned(g)
        return g, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, y: Tensor, token: Tensor, x: Tensor, site: _Site) -> tuple[Tensor, int]:  # noqa: ANN401, D102
        y, x = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((y, x), (in_dims[0], in_dims[2]), strict=True)
        )
        return Tap.apply(y, token, x, site), 0


@dataclass
class _Recorder(TorchFunctionMode):
    """Taps the ops that rules cover.

    Attributes:
        names: The parameters' names, by the identity of what stands for them.
        values: The parameters themselves, without gradient.
        token: A zero of each sample's own, which has a gradient.
    """

    names: dict[int, str]
    values: Named
    token: Tensor
    found: dict[str, list[PerSample]] = field(default_factory=dict)
    forward_is_over: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        if func in REWRITES:
            with self:
                result = REWRITES[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in RULES and (bound := RULES[func].bind(args, kwargs)):
            names = {role: self.names[p] for role in ROLES if (p := id(bound.arguments.get(role))) in self.names}
            if names:
                return self._tapped(func, bound, names)
        return func(*args, **kwargs)

    def _tapped(self, func: Op, bound: inspect.BoundArguments, names: dict[str, str]) -> Tensor:
        x = bound.arguments["input"]
        bound.arguments.update({role: self.values[name] for role, name in names.items()})
        y: Tensor = func(*bound.args, **bound.kwargs)
        site = _Site(self, RULES[func], {k: v for k, v in bound.arguments.items() if k != "input"}, names)
        return Tap.apply(y, self.token, x, site)  # type: ignore[no-any-return]  # a Tensor


def per_sample(model: nn.Module, loss_fn: LossFn) -> Callable[[Batch, Tensor], dict[str, PerSample]]:
    """Return the function of (inputs, targets) that runs both passes: {parameter name: its g_i}.

    Args:
        model: The backend's own copy.
        loss_fn: (outputs [N, ...], targets [N, ...]) -> losses [N].
    """
    parameters = trainable(model)
    values = {name: p.detach() for name, p in parameters.items()}

    def run(inputs: Batch, targets: Tensor) -> dict[str, PerSample]:
        n = size(inputs)
        copies = {name: p.expand(n, *p.shape).requires_grad_() for name, p in values.items()}
        token = next(iter(values.values())).new_zeros(n, requires_grad=True)
        recorders: list[_Recorder] = []

        def loss(copies: Named, token: Tensor, buffers: Named, inputs: Batch, targets: Tensor) -> Tensor:
            names = {id(p): name for given in (parameters, copies) for name, p in given.items()}
            recorder = _Recorder(names, values, token, {name: [] for name in values})
            recorders.append(recorder)
            inputs, targets = apply(lambda t: t[None], inputs), apply(lambda t: t[None], targets)
            with recorder:
                outputs = call(lambda *a, **k: functional_call(model, (copies, buffers), a, k), inputs)
                return loss_fn(outputs, targets).sum()

        buffers = {name: b.clone() for name, b in model.named_buffers()}
        losses = vmap(loss, (0, 0, None, 0, 0), randomness="different")(copies, token, buffers, inputs, targets)
        (recorder,) = recorders
        recorder.forward_is_over = True
        direct = _backward(losses, token, copies, parameters)
        for name, g in direct.items():
            recorder.found[name].append(Dense(g))
        return {name: added(recorder.found[name], n, p) for name, p in values.items()}

    return run


def _backward(losses: Tensor, token: Tensor, copies: Named, parameters: Mapping[str, Tensor]) -> Named:
    """Run the backward pass, and return the gradients [N, *shape] by the copies that were used outside of rules.

    Raises:
        Unsupported: A parameter itself was used, by something that neither vmap nor a rule has seen.
    """
    if not losses.requires_grad:
        return {}
    wanted = [token, *copies.values(), *parameters.values()]
    found = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)[1:]
    for name, missed in zip(parameters, found[len(copies) :], strict=True):
        if missed is not None:
            raise Unsupported(f"parameter `{name}` is used in a way that is out of sight, by a reference that was kept")
    return {name: g for name, g in zip(copies, found, strict=False) if g is not None}
