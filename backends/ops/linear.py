"""Rules for matrices: linear layers, products with a parameter, embeddings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.derived import squares_of
from backends.ops.choice import capturing, fastest
from backends.ops.outer import Outer
from backends.ops.persample import Dense, Empty, PerSample, fresh, scaled
from backends.ops.rules import Pieces, rewrite, rule

FEW = 8
"""Times as many rows as a sample takes in a table that may be made for each sample, if that is faster."""


def vectors(x: Tensor) -> Tensor:
    """Return [N, ..., d] as [N, T, d]."""
    return x if x.dim() == 3 else x.reshape(x.shape[0], -1, x.shape[-1])


def summed(g: Tensor) -> Dense:
    """Return the gradients [N, p] of a bias that was added to T vectors [N, T, p] of a sample."""
    return Dense(g[:, 0] if g.shape[1] == 1 else g.sum(1))


def _is_matrix(arguments: Mapping[str, Any]) -> bool:
    return bool(arguments["weight"].dim() == 2)


def _adds_a_row(arguments: Mapping[str, Any]) -> bool:
    """Return whether there is no bias, or one number of it for each output; others are broadcast."""
    bias, weight = arguments["bias"], arguments["weight"]
    return _is_matrix(arguments) and (bias is None or bias.shape == weight.shape[:1])


@rule(F.linear, covers=_adds_a_row, folds=True)
def linear(g: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Pieces:
    """For y = x Wᵀ + b."""
    g = vectors(g)
    return {"weight": Outer(g, vectors(input)), **({} if bias is None else {"bias": summed(g)})}


@rule(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, covers=_is_matrix, folds=True)
def matmul(g: Tensor, input: Tensor, weight: Tensor) -> Pieces:
    """For y = x W."""
    return {"weight": Outer(vectors(input), vectors(g))}


@rewrite(F.bilinear)
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W z by an op that has a rule; vmap has none for torch's."""
    y = (torch.einsum("...i,kij->...kj", input1, weight) * input2.unsqueeze(-2)).sum(-1)
    return y if bias is None else y + bias


@rule(
    torch.addmm,
    covers=lambda a: _is_matrix(a) and a["bias"].shape == a["weight"].shape[1:] and a["alpha"] == a["beta"] == 1,
)
def addmm(g: Tensor, bias: Tensor, input: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Pieces:
    """For y = b + x W."""
    return {"weight": Outer(vectors(input), vectors(g)), "bias": summed(vectors(g))}


@dataclass
class Scattered(PerSample):
    """Gradients of a table [V, D] from which T rows of each sample were taken, each with a gradient.

    Attributes:
        index: Which rows [N, T].
        values: Their gradients [N, T, D].
        height: V.
    """

    index: Tensor
    values: Tensor
    height: int

    def __post_init__(self) -> None:
        self.samples, self.like = self.values.shape[0], self.values
        self.shape = (self.height, self.values.shape[2])

    def held(self) -> int:  # noqa: D102
        return self.index.nbytes + self.values.nbytes

    def rows(self, some: slice) -> Tensor:  # noqa: D102
        return self._tables(some, self.values.new_zeros(len(range(self.samples)[some]), *self.shape))

    def grads(self, empty: Empty) -> Tensor:  # noqa: D102
        return self._tables(slice(None), empty((self.samples, *self.shape), self.like).zero_())

    def add_to(self, total: Tensor, some: slice) -> None:  # noqa: D102
        self._tables(some, total)

    def _tables(self, some: slice, out: Tensor) -> Tensor:
        """Return the gradients of some samples [n, V, D], added to what is there."""
        values = self.values[some].to(out.dtype)  # under autocast, dtypes may differ
        return out.scatter_add_(1, self.index[some, :, None].expand_as(values), values)

    def squares(self) -> Tensor:  # noqa: D102
        (n, t), (height, width) = self.index.shape, self.shape
        ways = {"sorted": self.squares_by_sorting}
        if height <= FEW * t:
            ways["direct"] = super().squares
        return fastest(ways, f"norms of {t} rows of a table {height}×{width}", n, self.like)

    def squares_by_sorting(self) -> Tensor:
        """Return ‖g_i‖² [N]: the gradients of a row that was taken more than once are added first."""
        n, t = self.index.shape
        index, order = self.index.sort(1)
        first = F.pad(index.diff(dim=1) != 0, (1, 0), value=True)
        place = torch.empty_like(order).scatter_(1, order, first.cumsum(1) - 1)  # among the rows that the sample took
        place += t * torch.arange(n, device=index.device)[:, None]
        return squares_of(self._added(place, self.values, n * t)).view(n, t).sum(1)

    def weighted(self, factors: Tensor, empty: Empty = fresh) -> Tensor:  # noqa: D102
        values = scaled(self.values, factors)
        table = empty(self.shape, self.like).zero_()
        return table.index_add_(0, self.index.flatten(), values.flatten(0, 1))

    def variance(self) -> Tensor:
        """Return 1/N Σ (g_i − ḡ)² [V, D], zero in rows that no sample took."""
        if capturing(self.like):
            return super().variance()
        used, taken = self._taken()
        found = self.like.new_zeros(self.shape)
        found[used] = PerSample.variance(taken)
        return found

    def gram(self) -> Tensor:
        """Return ⟨g_i, g_j⟩ [N, N], of the rows that any sample took."""
        return super().gram() if capturing(self.like) else PerSample.gram(self._taken()[1])

    def _taken(self) -> tuple[Tensor, "Scattered"]:
        """Return which rows any sample took, and the gradients of a table of those alone; it waits for a value."""
        used, place = torch.unique(self.index, return_inverse=True)
        return used, Scattered(place, self.values, len(used))

    def _added(self, index: Tensor, values: Tensor, height: int) -> Tensor:
        table: Tensor = values.new_zeros(height, values.shape[2])
        return table.index_add_(0, index.flatten(), values.flatten(0, 1))


@rule(F.embedding, covers=lambda a: not (a["max_norm"] or a["scale_grad_by_freq"]))
def embedding(
    g: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Pieces:
    """For y_t = W[x_t]; the row `padding_idx` gets no gradient."""
    index, g = input.reshape(input.shape[0], -1), vectors(g)
    if padding_idx is not None:
        g = g.masked_fill((index == padding_idx % len(weight))[:, :, None], 0)  # NaN too
    return {"weight": Scattered(index, g, weight.shape[0])}


@rule(Tensor.__getitem__, covers=lambda a: _is_matrix(a) and _are_rows(a["input"]))
def rows(g: Tensor, weight: Tensor, input: Tensor) -> Pieces:
    """For y_t = W[x_t]; the last row is −1, too."""
    index = input.reshape(len(input), -1)
    return {"weight": Scattered(index.remainder(len(weight)).long(), vectors(g), len(weight))}


def _are_rows(index: Any) -> bool:  # noqa: ANN401  whatever a tensor may be indexed by
    return isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
