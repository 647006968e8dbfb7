"""Gradients that are sums of outer products: of the weight of a linear layer, and of what can be written as one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from backends import precision
from backends.derived import squares_of, wide
from backends.ops.choice import Paths, capturing, fastest
from backends.ops.gram import inner_products, sums
from backends.ops.persample import WIDER, Empty, PerSample, at_a_time, bytes_at_a_time, fresh, scaled

MANY = 64
"""Vectors from which on a kernel may be faster that makes half of their inner products."""


@dataclass
class Outer(PerSample):
    """Gradients of a matrix [p, d] that T vectors of a sample went through: g_i = Σ_t left_it right_itᵀ.

    ‖g_i‖² costs T·p·d by way of g_i, and T²·(p + d) as Σ_ts ⟨left_t, left_s⟩ ⟨right_t, right_s⟩, the Gram form; where
    that is less, the faster of the two is found by measuring. The sum cancels where the vectors do (activations with a
    large mean, gradients with none). So it is taken in a wider dtype and its rounding is bounded,
    |error| ≤ (p + d + T²) u (Σ_t ‖left_t‖ ‖right_t‖)², u the wider dtype's roundoff, or on a GPU estimated from what is
    summed. Samples where that is more than shows in the result, negative sums among them, are taken by way of g_i.
    float64 has no wider dtype: there all are.

    Attributes:
        left: [N, T, p].
        right: [N, T, d].
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        self.samples, _, p = self.left.shape
        self.shape, self.like = (p, self.right.shape[2]), self.left

    def rows(self, some: slice) -> Tensor:  # noqa: D102
        return outer(self.left[some], self.right[some])

    def held(self) -> int:  # noqa: D102
        return (self.left.numel() + self.right.numel()) * self.like.element_size()

    def grads(self, empty: Empty) -> Tensor:  # noqa: D102
        out = None if empty is fresh else empty((self.samples, *self.shape), self.like)
        return outer(self.left, self.right, out)

    def squares(self) -> Tensor:  # noqa: D102
        positions, (p, d) = self.left.shape[1], self.shape
        if positions == 1:
            return (_norms(self.left) * _norms(self.right)).square_().to(wide(self.like.dtype))
        ways = {"direct": super().squares}
        if positions * (p + d) < p * d and self.like.dtype in WIDER and not capturing(self.like):
            ways["gram"] = self.squares_by_gram
        by_gram: dict[str, Callable[..., Tensor]] = {}
        if 0 < positions * (p + d) < 2 * p * d:  # half of that is multiplied
            by_gram["gram"] = self.squares_by_gram_fused
            if positions >= MANY and self.like.dtype == torch.float32:
                by_gram["half of gram"] = partial(self.squares_by_gram_fused, by_kernel=True)
        kernels: dict[str, Paths] = {"fused": self.squares_fused}
        kernels |= {f"{name}, fused": in_doubt_too(way) for name, way in by_gram.items()}
        unchecked = {f"{name}, few programs": in_doubt_too(partial(way, few=True)) for name, way in by_gram.items()}
        return fastest(ways, f"norms of {self.geometry()}", self.samples, self.like, kernels, unchecked)

    def variance(self) -> Tensor:
        """Return 1/N Σ (g_i − ḡ)²; of single vectors perhaps as a difference of moments."""
        if self.left.shape[1] != 1 or self.like.dtype not in WIDER:
            return super().variance()
        ways = {"moments": self.variance_by_moments}
        if self.bytes() <= bytes_at_a_time(self.like):
            ways["direct"] = super().variance
        return fastest(ways, f"variance of products {self.shape[0]}×{self.shape[1]}", self.samples, self.like)

    def variance_by_moments(self) -> Tensor:
        """Return 1/N Σ (g_i − ḡ)² of single vectors as a difference of moments, in a dtype that bears it."""
        left, right = (t[:, 0].to(WIDER[self.like.dtype]) for t in (self.left, self.right))
        found, (p, d) = self.like.new_empty(self.shape), self.shape
        for some in at_a_time(p, 2 * d * left.element_size(), self.like):
            mean = left[:, some].mT @ right / self.samples
            moment = left[:, some].square().mT @ right.square() / self.samples
            found[some] = moment.sub_(mean.square_()).clamp_(min=0)
        return found

    def weighted(self, factors: Tensor, empty: Empty = fresh) -> Tensor:  # noqa: D102
        left, right = self.left, self.right
        left, right = (
            (scaled(left, factors), right) if left.shape[2] <= right.shape[2] else (left, scaled(right, factors))
        )
        if left.stride(0) < left.stride(1):  # the samples are not on the first axis in memory: their order is all one
            left, right = left.transpose(0, 1), right.transpose(0, 1)
        out = empty(self.shape, self.like)
        return torch.mm(left.flatten(0, 1).mT, right.flatten(0, 1), out=out)

    def gram(self) -> Tensor:  # noqa: D102
        if self.left.shape[1] != 1:
            return super().gram()
        wider = WIDER.get(self.like.dtype, self.like.dtype)  # one factor may be far larger than the product
        left, right = self.left[:, 0].to(wider), self.right[:, 0].to(wider)
        return ((left @ left.mT) * (right @ right.mT)).to(self.like.dtype)

    def geometry(self) -> str:  # noqa: D102
        return f"{self.left.shape[1]} products {self.shape[0]}×{self.shape[1]}"

    def squares_fused(self) -> Tensor:
        """Return ‖g_i‖² [N] by a Triton kernel that writes no g_i."""
        from backends.ops.kernels import squares_of_products  # triton need not be installed

        return squares_of_products(self.left, self.right)

    def squares_by_gram_fused(self, by_kernel: bool = False, allowed: float | None = None, few: bool = False) -> Tensor:
        """Return ‖g_i‖² [N] by Triton kernels in the Gram form, but for samples where its rounding might show."""
        from backends.ops.gram_kernel import squares_by_gram  # triton need not be installed

        return squares_by_gram(self.left, self.right, shows(self.like) if allowed is None else allowed, by_kernel, few)

    def squares_by_gram(self) -> Tensor:
        """Return ‖g_i‖² [N] by the Gram form, but for samples where it cancels."""
        (positions, p), d, wider, found = self.left.shape[1:], self.right.shape[2], WIDER[self.like.dtype], []
        for some in at_a_time(self.samples, 2 * positions**2 * wider.itemsize, self.like):
            left, right = self.left[some], self.right[some]
            lefts, rights = (inner_products(t.to(wider)) for t in (left, right))
            squares, doubtful = sums(lefts, rights, p + d, self.like.dtype)
            if doubtful.any():
                squares[doubtful] = squares_of(outer(left[doubtful], right[doubtful]))
            found.append(squares.to(wide(self.like.dtype)))
        return torch.cat(found)


def in_doubt_too(way: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], ...]:
    """Return a way to norms in the Gram form, and what it would do if every sample were in doubt: here few may be."""
    return way, partial(way, allowed=0.0)


def shows(like: Tensor) -> float:
    """Return the relative error of a square that shows beside what else is rounded."""
    if like.is_cuda and like.dtype == torch.float32 and precision.tf32_in_products():
        return 2.0**-11
    return max(2.0**-16, torch.finfo(like.dtype).eps / 2)  # in float32, 64 roundings of a norm


def _norms(vectors: Tensor) -> Tensor:
    """Return the norms [N] of single vectors [N, 1, d], where one may be far larger than its product with another."""
    if vectors.dtype not in WIDER:
        return squares_of(vectors).sqrt_()
    norms: Tensor = torch.linalg.vector_norm(vectors[:, 0], dim=1, dtype=torch.float64)
    return norms


def outer(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return Σ_t left_it right_itᵀ [N, p, d] of [N, T, p] and [N, T, d]."""
    if left.shape[1] != 1:
        return torch.bmm(left.mT, right, out=out)
    each = partial(torch.mul, left.mT, right, out=out)
    if not left.is_cuda:  # on a CPU this takes a third of the time of a product of matrices
        return each()
    ways = {"each": each}
    if not precision.tf32_allowed(left):
        ways["product"] = partial(torch.bmm, left.mT, right, out=out)
    kernels = {"kernel": partial(_outer_by_kernel, left, right, out)}
    return fastest(ways, f"products {left.shape[2]}×{right.shape[2]}", left.shape[0], left, kernels)


def _outer_by_kernel(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    from backends.ops.kernels import outer_products  # triton need not be installed

    if out is None or not out.is_contiguous():
        made = outer_products(left[:, 0], right[:, 0], left.new_empty(len(left), left.shape[2], right.shape[2]))
        return made if out is None else out.copy_(made)
    return outer_products(left[:, 0], right[:, 0], out)
