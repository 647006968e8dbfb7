"""Several at a time: uses of one parameter, samples that were run one at a time, small parameters side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from backends.derived import Named, rows_of, squares_of, variance_of, weighted_sum
from backends.ops.outer import Outer
from backends.ops.persample import Dense, Empty, PerSample, fresh, sum_of


@dataclass
class Sum(PerSample):
    """The sum of gradients by several uses of one parameter; by none of them, zeros."""

    terms: list[PerSample]
    samples: int
    shape: tuple[int, ...]
    like: Tensor

    def rows(self, some: slice) -> Tensor:  # noqa: D102
        if not self.terms:
            return self.like.new_zeros(len(range(self.samples)[some]), *self.shape)
        first, *others = self.terms
        total = first.rows(some).to(self.like.dtype, copy=isinstance(first, Dense))  # under autocast, dtypes may differ
        for term in others:
            term.add_to(total, some)
        return total

    def held(self) -> int:  # noqa: D102
        return sum(term.held() or term.bytes() for term in self.terms)

    def weighted(self, factors: Tensor, empty: Empty = fresh) -> Tensor:  # noqa: D102
        if not self.terms:
            return self.like.new_zeros(self.shape)
        first, *others = self.terms
        total = first.weighted(factors).to(self.like.dtype)
        for term in others:
            total += term.weighted(factors)
        return total


@dataclass
class Grouped(PerSample):
    """Gradients of samples that were run in two groups, each in the order of the batch.

    Attributes:
        groups: Those of the first group and of the second.
        first: Whether a sample is in the first one.
    """

    groups: list[PerSample]
    first: Sequence[bool]

    def __post_init__(self) -> None:
        self.samples, self.shape, self.like = len(self.first), self.groups[0].shape, self.groups[0].like

    def rows(self, some: slice) -> Tensor:  # noqa: D102
        start, stop, _ = some.indices(self.samples)
        out = self.like.new_empty(stop - start, *self.shape)
        for group, members in self._members():
            here = members[start:stop]
            if not here.any():
                continue
            before = int(members[:start].sum())
            out[here] = group.rows(slice(before, before + int(here.sum()))).to(out.dtype)
        return out

    def held(self) -> int:  # noqa: D102
        return sum(group.held() or group.bytes() for group in self.groups)

    def squares(self) -> Tensor:  # noqa: D102
        found = [(group.squares(), members) for group, members in self._members()]
        out = found[0][0].new_empty(self.samples)
        for squares, members in found:
            out[members] = squares
        return out

    def weighted(self, factors: Tensor, empty: Empty = fresh) -> Tensor:  # noqa: D102
        return sum_of(group.weighted(factors[members]) for group, members in self._members())

    def _members(self) -> list[tuple[PerSample, Tensor]]:
        first = torch.tensor(self.first, device=self.like.device)
        return list(zip(self.groups, (first, ~first), strict=True))


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


class Together:
    """Small gradients of several parameters, side by side [N, numbers]: a call of an op costs more than its arithmetic.

    Those of one dtype are put together.

    Args:
        parts: By name, small gradients, or what was wanted of others.
    """

    def __init__(self, parts: Mapping[str, Tensor | PerSample]) -> None:
        small = [(name, part) for name, part in parts.items() if isinstance(part, PerSample)]
        self._others = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
        self._shapes: list[dict[str, tuple[int, ...]]] = []
        self._rows: list[Tensor] = []
        for dtype in dict.fromkeys(g.like.dtype for _, g in small):
            alike = {name: g for name, g in small if g.like.dtype == dtype}
            self._shapes.append({name: g.shape for name, g in alike.items()})
            self._rows.append(torch.cat([rows_of(g.rows(slice(None))) for g in alike.values()], 1))

    def squares(self) -> Tensor:
        """Return ‖g_i‖² [N] over all parameters; of the others, what they add to it was wanted."""
        return sum_of([*(squares_of(rows) for rows in self._rows), *self._others.values()])

    def weighted(self, factors: Tensor) -> Named:
        """Return Σ_i c_i g_i of the small ones by name, for factors c [N]."""
        return self._by_name([weighted_sum(factors, rows) for rows in self._rows])

    def variances(self) -> Named:
        """Return 1/N Σ (g_i − ḡ)² by name; of the others, that was wanted."""
        return self._by_name([variance_of(rows) for rows in self._rows]) | self._others

    def gram(self) -> Tensor:
        """Return ⟨g_i, g_j⟩ [N, N] over all parameters; of the others, what they add to it was wanted."""
        return sum_of([*(rows @ rows.mT for rows in self._rows), *self._others.values()])

    def _by_name(self, found: list[Tensor]) -> Named:
        named: Named = {}
        for shapes, t in zip(self._shapes, found, strict=True):
            pieces = t.split([prod(shape) for shape in shapes.values()])
            shaped = zip(shapes.items(), pieces, strict=True)
            named |= {name: piece.view(shape).clone() for (name, shape), piece in shaped}
        return named


def added(terms: list[PerSample], samples: int, like: Tensor) -> PerSample:
    """Return the gradients of a parameter `like` that has several uses; matrices' vectors are put side by side."""
    if len(terms) == 1:
        return terms[0]
    pairs = [term for term in terms if isinstance(term, Outer)]
    if pairs and len(pairs) == len(terms):
        return Outer(torch.cat([t.left for t in pairs], 1), torch.cat([t.right for t in pairs], 1))
    return Sum(terms, samples, tuple(like.shape), like)
