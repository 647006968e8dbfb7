"""Where a library takes the samples to be in the tensors that go into a call and come out of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Rows:
    """Where the samples are in a tensor: along `axis`, in order, or as `samples` says of each place on it."""

    tensor: Tensor
    axis: int = 0
    samples: Tensor | None = None

    def count(self) -> int:
        """Return how many samples there seem to be."""
        if self.samples is not None:
            return int(self.samples.max()) + 1
        return self.tensor.shape[self.axis] if self.tensor.dim() > self.axis else 0

    def reached(self, grad: Tensor) -> list[int]:
        """Return the samples in whose rows a gradient of the tensor is not zero."""
        grad = grad.detach().nan_to_num(0)
        rows = grad.movedim(self.axis, 0).flatten(1) if grad.dim() > 1 else grad.reshape(-1, 1)
        found = (rows != 0).any(1).nonzero().flatten()
        return [int(i) for i in (found if self.samples is None else self.samples.to(found.device)[found]).unique()]


RowsOf: TypeAlias = Callable[[Any, Any, Any], tuple[list[Rows], list[Rows]]]
"""(function, its arguments, its result) -> where the library takes the samples to be, going in and coming out."""


def batch_first(function: object, inputs: Any, output: Any) -> tuple[list[Rows], list[Rows]]:  # noqa: ANN401
    """Return the samples on the first axis of all that goes in, and of the first tensor that comes out."""
    return [Rows(t) for t in tensors_in(inputs)], [Rows(t) for t in tensors_in(output)[:1]]


def tensors_in(tree: Any) -> list[Tensor]:  # noqa: ANN401  what hooks and functions are called with
    """Return the tensors in nested tuples, lists and dicts."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
