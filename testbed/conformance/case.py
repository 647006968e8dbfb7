"""A conformance case, and the pieces its two generators (`layers.py`, `models.py`) share.

A case is a name and a recipe: `case.build()` makes a fresh model, loss and batch, the same at every call, in float64
on the CPU, and leaves the global random state alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from backends.base import LossFn
from backends.batch import Batch, cast

# Samples, positions, features, outputs. No dimension is N but where a case wants it: a confused axis shows in a shape.
N, T, D, K = 4, 5, 6, 3

SEED = 20240229

Forward: TypeAlias = Callable[..., Tensor]
"""(module, *inputs) -> outputs."""


@dataclass(frozen=True, eq=False)
class Setup:
    """What a case hands to a backend; floating-point tensors are float64, samples are on the first axis."""

    model: nn.Module
    loss_fn: LossFn
    inputs: Batch
    targets: Tensor


@dataclass(frozen=True)
class Case:
    """One problem of the matrix.

    Args:
        name: Unique, stable and readable: `Conv2d(padding_mode='reflect')`, `Linear input 3-D`.
        layer: The class in torch.nn, or "model" for a whole-model case.
        option: What is varied: `padding_mode='reflect'` for a constructor option, else words; empty for the base.
        build: Makes the problem.
        reason: Why a library might get it wrong.
    """

    name: str
    layer: str
    option: str
    build: Callable[[], Setup] = field(repr=False, compare=False)
    reason: str = ""


def case(name: str, layer: str, option: str, make: Callable[[], Setup], reason: str = "") -> Case:
    """Return the case whose `build` runs `make` under a fixed seed and turns what it made into float64.

    `make` draws from torch's CPU generator only.
    """
    return Case(name, layer, option, partial(_build, make), reason)


def _build(make: Callable[[], Setup]) -> Setup:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(SEED)  # not torch.manual_seed: that reseeds the GPUs as well
        with torch.enable_grad():
            made = make()
        model = made.model.double()
        for p in model.parameters():  # a norm's weights of 1, an attention's biases of 0 would hide errors
            p.add_(0.1 * torch.randn_like(p))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.normal_()
            elif name.endswith("running_var"):
                b.uniform_(0.5, 2.0)
    return Setup(model, made.loss_fn, cast(made.inputs, torch.float64), cast(made.targets, torch.float64))


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of squares [N] of outputs [N, ...] minus targets of the same shape."""
    return (outputs - targets).flatten(1).square().sum(1)


def real(*shape: int) -> Tensor:
    """Return normal numbers."""
    return torch.randn(shape)


def tokens(vocabulary: int, *shape: int) -> Tensor:
    """Return token numbers in [0, vocabulary); the first is 0 and the last is vocabulary − 1, so that both occur."""
    drawn = torch.randint(vocabulary, shape)
    drawn.view(-1)[0], drawn.view(-1)[-1] = 0, vocabulary - 1
    return drawn


def constant(*shape: int, like: Tensor) -> Tensor:
    """Return fixed, unequal numbers in [−1, 1], in the dtype and on the device of `like`."""
    return torch.linspace(-1, 1, prod(shape), dtype=like.dtype, device=like.device).view(shape)


class Net(nn.Module):
    """A model in one expression.

    Args:
        function: (net, *inputs) -> outputs [N, ...].
        parts: Its modules, parameters and buffers (plain tensors), by name.
    """

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Any, **named: Any) -> Any:  # noqa: ANN401  a model's part may take and return anything
        """Return `function(self, ...)`."""
        return self.function(self, *inputs, **named)


@dataclass(frozen=True)
class Layout:
    """A way in which a model hands a layer its input.

    Args:
        use: (layer, x, *extra) -> [N, ...].
        shape: The shape of a sample of x; None: x is made by `tokens`.
        options: Constructor options that it takes.
        extra: Makes further inputs of the model, given the number of samples.
        tokens: Makes token inputs, given the number of samples, where `shape` is None.
        training: The mode the model is in.
        samples: N.
        reason: Why a library might get it wrong.
    """

    use: Forward
    shape: tuple[int, ...] | None
    options: Mapping[str, object] = field(default_factory=dict)
    extra: Callable[[int], tuple[Tensor, ...]] = lambda n: ()
    tokens: Callable[[int], Tensor] = lambda n: tokens(7, n, T)
    training: bool = True
    samples: int = N
    reason: str = ""

    def setup(self, layer: nn.Module) -> Setup:
        """Return the layer between two Linears: gradients flow into its parameters and through it.

        The Linears see nothing but [N, features], which every library handles: what goes wrong is the layer's doing.
        """
        first = self.tokens(self.samples) if self.shape is None else real(self.samples, 2)
        inputs = (first, *self.extra(self.samples))
        before = (
            nn.Identity()
            if self.shape is None
            else nn.Sequential(nn.Linear(2, prod(self.shape)), nn.Unflatten(1, self.shape))
        )
        # Some layers cannot run in training mode on the CPU; the call only tells how many numbers the layer returns.
        width = self.use(layer.eval(), before(first), *inputs[1:]).flatten(1).shape[1]
        model = Net(
            lambda net, x, *extra: net.after(self.use(net.layer, net.before(x), *extra).flatten(1)),
            before=before,
            layer=layer,
            after=nn.Linear(width, K),
        )
        inputs_ = inputs if len(inputs) > 1 else first
        return Setup(model.train(self.training), squared_error, inputs_, real(self.samples, K))


def everyday(layout: Layout, unbatched: bool = True) -> dict[str, Layout]:
    """Return what people do with a layer of one tensor, by words: its batch is then not the model's.

    Args:
        layout: The plain call.
        unbatched: Whether the layer takes a sample without batch axis.
    """
    use, shape = layout.use, layout.shape or ()

    def scaled(y: Tensor, x: Tensor) -> Tensor:  # one result for all samples, weighted by each
        return y * x.flatten(1).sum(1).view(-1, *[1] * (y.dim() - 1))

    def like(reason: str, use: Forward, shape: tuple[int, ...] = shape) -> Layout:
        return replace(layout, use=use, shape=shape, reason=reason)

    found = {
        "frames folded into the batch": like(
            "the layer's batch is 2N", lambda f, x: use(f, x.flatten(0, 1)).reshape(len(x), -1), (2, *shape)
        ),
        "samples reordered in the model": like(
            "the layer's i-th row is not the i-th sample", lambda f, x: use(f, x.flip(0)).flip(0)
        ),
        "two views in one batch": like(
            "the layer's batch is 2N, a sample's rows far apart",
            lambda f, x: torch.mul(*use(f, torch.cat([x, x + 1])).chunk(2)),
        ),
        "one call a sample": like(
            "the layer's batch is 1, N times", lambda f, x: torch.cat([use(f, s) for s in x.split(1)])
        ),
        "called twice": like("the gradient is the sum over calls", lambda f, x: use(f, x) * use(f, x.flip(1))),
        "constant input, batch of 1": like(
            "each sample has its own gradient from one row", lambda f, x: scaled(use(f, constant(1, *shape, like=x)), x)
        ),
        "called with batches of N and of 1": like(
            "the second call's one row is no sample's row", lambda f, x: use(f, x) * use(f, constant(1, *shape, like=x))
        ),
    }
    if unbatched:
        found["one unbatched call a sample"] = like(
            "there is no batch axis", lambda f, x: torch.stack([use(f, s) for s in x])
        )
        found["constant input without batch axis"] = like(
            "the first axis is not the batch", lambda f, x: scaled(use(f, constant(*shape, like=x))[None], x)
        )
    return found


def sequence_first(layout: Layout) -> dict[str, Layout]:
    """Return the layer called on [T, N, ...] inside a model whose input is [N, T, ...], by words."""
    use, shape = layout.use, layout.shape
    turned = replace(
        layout,
        use=lambda f, x: use(f, x.transpose(0, 1)).transpose(0, 1),
        reason="the batch is on the second axis; with T = N no shape shows it",
    )
    square = replace(turned, shape=shape and (N, *shape[1:]), tokens=lambda n: tokens(7, n, N))
    return {"sequence-first": turned, "sequence-first, T = N": square}
