"""At each op that a rule covers, a pair: what went in (a), and the gradient of what came out (g).

Where a rule applies, the op gets the parameter itself, without gradient, and a `Tap` behind it keeps a and, in the
backward pass, takes g. What is done with both is in `recorder.py`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from backends.ops.places import Place
from backends.ops.rules import Rule

if TYPE_CHECKING:
    from backends.ops.recorder import Recorder


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
        place: The samples' in what goes in and comes out, in a pass over the batch; None under vmap.
    """

    recorder: "Recorder"
    rule: Rule
    arguments: dict[str, Any]
    names: dict[str, str]
    place: Place | None

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
        x = self.arguments["input"]
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if self.place is not None:
            g, x = self.place.samples_first(g), self.place.samples_first(x)
        self.recorder.show(g)
        self.arguments["input"] = x
        pieces = self.rule.gradients(g, **self.arguments)
        self.arguments.clear()
        for role, name in self.names.items():
            self.recorder.take(name, pieces[role])

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
        return torch.unsafe_chunk(y, 1)[0]  # no view of it, on which the model might not go on in place

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
