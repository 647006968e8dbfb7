"""Where the samples are in the tensors of a pass over the batch: not always on the first axis, nor alone on it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """Where the samples are in what goes into an op and comes out of it, in a pass over the batch.

    Attributes:
        axis: On which axis; None where there is one sample, to which all belongs.
        rows: How many entries on it each sample has.
        apart: Whether these are N apart, not one after the other.
    """

    axis: int | None
    rows: int = 1
    apart: bool = False

    def fits(self, x: Tensor, y: Tensor, n: int) -> bool:
        """Return whether N samples can be here in what goes into an op and comes out of it."""
        axis, length = (0, 1) if self == SHARED else (self.axis or 0, n * self.rows)
        return axis < min(x.dim(), y.dim()) and x.shape[axis] == y.shape[axis] == length

    def samples_first(self, t: Tensor) -> Tensor:
        """Return a tensor as [N, rows, ...]: a sample is a batch of its own, as under vmap."""
        if self.axis is None:
            return t[None]
        t = t.movedim(self.axis, 0) if self.axis else t
        if self.rows == 1:
            return t.unsqueeze(1)
        split: Tensor = t.unflatten(0, (self.rows, -1) if self.apart else (-1, self.rows))
        return split.transpose(0, 1) if self.apart else split


SHARED = Place(-1)
"""Nowhere: what goes in and comes out is the same for all of them."""

ALONE = Place(None)


class Layout(NamedTuple):
    """What is known of a pass over the batch.

    Attributes:
        places: The samples' place at each tap.
        uses: How often parameters are used.
        names: Which parameters are used at each tap.
        copies: Those that are there as [N, ...] and have a gradient.
        answers: What the pass answered.
    """

    places: Sequence[Place]
    uses: Mapping[str, int]
    names: Sequence[tuple[str, ...]]
    copies: Sequence[str]
    answers: tuple[bool, ...] = ()


def likely(x: Tensor, n: int, apart: bool) -> list[Place]:
    """Return where N samples may be in a tensor, the likeliest first.

    Args:
        x: The tensor.
        n: N.
        apart: Where several entries on an axis belong to a sample, whether they are likelier N apart.
    """
    rows = len(x) // n if x.dim() else 0
    several = [Place(0, rows, apart), Place(0, rows, not apart)] if rows > 1 else []
    return [*(Place(axis) for axis in range(x.dim())), SHARED, *several]
