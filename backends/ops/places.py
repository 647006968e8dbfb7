"""Where the samples are in the tensors of a pass over the batch: not always on the first axis, nor alone on it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from backends.ops.vmapped import Plan


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
        if self == WITHOUT:
            return True
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

WITHOUT = Place(-2)
"""No samples are in what goes in, and what comes out is made of parameters alone: autograd goes through the op."""

ALONE = Place(None)


class Layout(NamedTuple):
    """What is known of a pass over the batch.

    Attributes:
        places: The samples' place at each tap.
        uses: How often parameters are used.
        names: Which parameters are used at each tap.
        made: Of each tensor that may be made of parameters alone, whether it is.
        copies: Those at ops under vmap, of which each sample has one entry on an axis.
        answers: What the pass answered.
        vmapped: How ops with parameters, other tensors and no rule are run, in their order.
    """

    places: Sequence[Place]
    uses: Mapping[str, int]
    names: Sequence[tuple[str, ...]]
    made: Sequence[bool]
    copies: Sequence[str]
    answers: tuple[bool, ...] = ()
    vmapped: Sequence["Plan"] = ()

    def one_row(self) -> bool:
        """Return whether each sample has one entry on its axis, everywhere."""
        return all(place.rows == 1 for place in self.places) and all(plan.one_row() for plan in self.vmapped)


Sizes: TypeAlias = list[torch.Size]
"""Of the tensors that go into an op."""


Elsewhere: TypeAlias = tuple[int, torch.Size | None]
"""Another number of samples, and a tensor's size for it, if that is known."""


class Guess(NamedTuple):
    """What is guessed in a pass over the batch that is not known.

    Attributes:
        apart: Where several entries on an axis belong to a sample, whether they are likelier N apart.
        shared: Whether what is the same for all samples is tapped as theirs; else it is made of parameters alone.
        sizes: By N, of all ops that have rules: an input that is as large for another N has no samples.
    """

    apart: bool = False
    shared: bool = True
    sizes: Mapping[int, Sequence[Sizes]] = MappingProxyType({})

    def elsewhere(self, n: int, op: int) -> tuple[int, Sizes]:
        """Return another N, and the sizes at an op for it, where they are known."""
        found = ((other, sizes[op]) for other, sizes in self.sizes.items() if other != n and op < len(sizes))
        return next(found, (n, []))


GUESSES = Guess(), Guess(apart=True), Guess(shared=False)


def likely(x: Tensor, n: int, guess: Guess, elsewhere: Elsewhere) -> list[Place]:
    """Return where N samples may be in a tensor, the likeliest first.

    Args:
        x: The tensor.
        n: N.
        guess: What is guessed.
        elsewhere: Another N, and the tensor's size for it: samples are on an axis that is longer for more of them.
    """
    other, shape = elsewhere
    follow = [shape is None or x.shape[axis] * other == shape[axis] * n for axis in range(x.dim())]
    if not any(follow):
        return [SHARED, WITHOUT] if guess.shared else [WITHOUT]
    rows = len(x) // n if follow[0] else 0
    several = [Place(0, rows, guess.apart), Place(0, rows, not guess.apart)] if rows > 1 else []
    return [*(Place(axis) for axis in range(x.dim()) if follow[axis]), *several, WITHOUT]
