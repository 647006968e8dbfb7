"""What a model asks of autograd in its forward pass: under vmap, torch answers that nothing has a gradient.

The batched tensor below does have one. Asking that one keeps `if y.requires_grad`, `y.register_hook(…)` and modules
with backward hooks what they are in an ordinary forward pass: right, or refused by torch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils.hooks import RemovableHandle

from backends.ops.rules import UNDER_VMAP, rewrite


class _Found:
    """The tensor below all levels of vmap, and the axis on which each level, innermost first, has its batch."""

    tensor: Tensor
    axes: tuple[int, ...] = ()


class _Look(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, found: _Found) -> Tensor:
        found.tensor = x
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, found: _Found) -> tuple[Tensor, int]:  # noqa: ANN401
        found.axes += (in_dims[0],)
        return _Look.apply(x, found), in_dims[0]


def _below(x: Tensor) -> _Found:
    found = _Found()
    _Look.apply(x, found)
    return found


@rewrite(Tensor.requires_grad.__get__, watched=False, passes=[UNDER_VMAP])  # type: ignore[attr-defined]  # a property of a C type
def requires_grad(x: Tensor) -> bool:
    """Return whether x has a gradient."""
    return _below(x).tensor.requires_grad


@rewrite(Tensor.register_hook, watched=False, passes=[UNDER_VMAP])
def register_hook(x: Tensor, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Register a hook, which is to see each sample's gradient on its own."""

    def lifted(g: Tensor) -> Tensor:
        changed = hook(g)
        return g if changed is None else changed

    found = _below(x)
    for axis in found.axes:
        lifted = vmap(lifted, axis, axis, randomness="different")
    handle: RemovableHandle = found.tensor.register_hook(lifted)
    return handle
