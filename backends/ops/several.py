"""Gradients of several uses of one parameter, or of samples that were run one at a time, as one form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from backends.ops.persample import Empty, Outer, PerSample, fresh


@dataclass
class Sum(PerSample):
    """The sum of gradients by several uses of one parameter; by none of them, zeros."""

    terms: list[PerSample]
    samples: int
    shape: tuple[int, ...]
    like: Tensor

    def rows(self, some: slice) -> Tensor:  # noqa: D102
        total = self.like.new_zeros(len(range(self.samples)[some]), *self.shape)
        for term in self.terms:
            total += term.rows(some)
        return total

    def weighted(self, factors: Tensor, empty: Empty = fresh) -> Tensor:  # noqa: D102
        total = self.like.new_zeros(self.shape)
        for term in self.terms:
            total += term.weighted(factors)
        return total


@dataclass
class Stacked(PerSample):
    """Gradients of samples that were run one at a time: of each, those of a batch of one."""

    singles: list[PerSample]

    def __post_init__(self) -> None:
        self.samples, self.shape, self.like = len(self.singles), self.singles[0].shape, self.singles[0].like

    def rows(self, some: slice) -> Tensor:  # noqa: D102
        return torch.cat([single.rows(slice(None)) for single in self.singles[some]])

    def squares(self) -> Tensor:  # noqa: D102
        return torch.cat([single.squares() for single in self.singles])

    def weighted(self, factors: Tensor, empty: Empty = fresh) -> Tensor:  # noqa: D102
        total = self.like.new_zeros(self.shape)
        for single, factor in zip(self.singles, factors, strict=True):
            total += single.weighted(factor[None])
        return total


def added(terms: list[PerSample], samples: int, like: Tensor) -> PerSample:
    """Return the gradients of a parameter `like` that has several uses; matrices' vectors are put side by side."""
    if len(terms) == 1:
        return terms[0]
    pairs = [term for term in terms if isinstance(term, Outer)]
    if pairs and len(pairs) == len(terms):
        return Outer(torch.cat([t.left for t in pairs], 1), torch.cat([t.right for t in pairs], 1))
    return Sum(terms, samples, tuple(like.shape), like)
