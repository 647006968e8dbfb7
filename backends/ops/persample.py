"""The per-sample gradients g_i of one parameter, held in whatever form is cheapest, and what is wanted of them.

A form says how to make the gradients of some samples (`rows`). Everything else has a default that makes a few samples
at a time, so that memory stays bounded; a form overrides what it can have for less.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from backends import precision
from backends.derived import Moments, default_bytes, rows_of, slices, squares_of, weighted_sum, wide
from backends.heap import LARGEST
from backends.ops.choice import capturing, fastest

AT_A_TIME = {"cpu": 2**21}
"""Bytes of gradients made at a time where they are not the result: on a CPU they stay in its cache."""

AT_A_TIME_ELSEWHERE = 2**26  # in ResNet-18 on a GPU, four times as much took 1.5 times the memory of a step

SMALL = 4096
"""Numbers in a parameter, of biases and the like, up to which a call of an op costs more than what it computes."""

LITTLE = 2**17
"""Bytes of all gradients of a parameter, up to which the same holds of those that are not there yet."""

Empty: TypeAlias = Callable[[tuple[int, ...], Tensor], Tensor]
"""(shape, like) -> memory for a result, of the dtype and on the device of `like`."""


def fresh(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return memory from torch's allocator."""
    return like.new_empty(shape)


class PerSample(ABC):
    """g_i [N, *shape] of one parameter, N ≥ 1.

    Attributes:
        samples: N.
        shape: The parameter's.
        like: Any tensor of the gradients' dtype and device.
    """

    samples: int
    shape: tuple[int, ...]
    like: Tensor

    @abstractmethod
    def rows(self, some: slice) -> Tensor:
        """Return the gradients of some samples [n, *shape]."""

    def held(self) -> int:
        """Return how many bytes this form holds; 0 where that is always less than the gradients take."""
        return 0

    def compact(self) -> "PerSample":
        """Return the form to keep: this one, or the gradients where they take no more memory."""
        return Dense(self.grads(fresh)) if self.bytes() <= self.held() else self

    def grads(self, empty: Empty) -> Tensor:
        """Return all of g_i [N, *shape]; if they are large, in memory from `empty`."""
        if self.like.device.type != "cpu" or self.bytes() <= LARGEST:
            return self.rows(slice(None))
        out = empty((self.samples, *self.shape), self.like)
        for some in self.parts():
            out[some] = self.rows(some)
        return out

    def squares(self) -> Tensor:
        """Return ‖g_i‖² [N], in float32 at least."""
        found = [squares_of(self.rows(some)) for some in self.parts()]
        return torch.cat(found) if len(found) > 1 else found[0]

    def geometry(self) -> str:
        """Return all that the speed of a way depends on but the number of samples."""
        shape = "×".join(map(str, self.shape))
        return f"{type(self).__name__.lower()} {shape} in {self.held() // self.samples} bytes"

    def is_small(self) -> bool:
        """Return whether it is best to do all at once what is wanted of this one and of others: `several.Together`."""
        return self.bytes() <= LITTLE

    def weighted(self, factors: Tensor, empty: Empty = fresh) -> Tensor:
        """Return Σ_i c_i g_i [*shape] for factors c [N]; if it is large, perhaps in memory from `empty`."""
        first, *others = self.parts()
        total = weighted_sum(factors[first], self.rows(first))
        for some in others:
            total += weighted_sum(factors[some], self.rows(some))
        return total

    def variance(self) -> Tensor:
        """Return 1/N Σ (g_i − ḡ)² [*shape]."""
        moments = Moments()
        for some in self.parts():
            moments.add(self.rows(some))
        return moments.variance()

    def gram(self) -> Tensor:
        """Return ⟨g_i, g_j⟩ [N, N]: blocks of as many samples as may be held, against those after them."""
        found = self.like.new_empty(self.samples, self.samples)
        each = max(1, self.bytes() // self.samples)
        for block in slices(self.samples, max(1, default_bytes([self.like], held=True) // each)):
            held = rows_of(self.rows(block))
            found[block, block] = held @ held.mT
            for start in range(block.stop, self.samples, len(held)):
                later = slice(start, start + len(held))
                found[block, later] = held @ rows_of(self.rows(later)).mT
                found[later, block] = found[block, later].mT
        return found

    def parts(self) -> list[slice]:
        """Return slices of as many samples as are made at a time."""
        return at_a_time(self.samples, self.bytes() // self.samples, self.like)

    def bytes(self) -> int:
        """Return how much memory all of g_i take."""
        return self.samples * prod(self.shape) * self.like.element_size()


@dataclass
class Dense(PerSample):
    """Gradients that are there: `tensor` [N, *shape]."""

    tensor: Tensor

    def __post_init__(self) -> None:
        self.samples, *shape = self.tensor.shape
        self.shape, self.like = tuple(shape), self.tensor

    def rows(self, some: slice) -> Tensor:  # noqa: D102
        return self.tensor[some]

    def grads(self, empty: Empty) -> Tensor:  # noqa: D102
        return self.tensor.contiguous()

    def is_small(self) -> bool:  # noqa: D102
        return prod(self.shape) <= SMALL or super().is_small()

    def parts(self) -> list[slice]:  # noqa: D102
        return [slice(0, self.samples)]


@dataclass
class Outer(PerSample):
    """Gradients of a matrix [p, d] that T vectors of a sample went through: g_i = Σ_t left_it right_itᵀ.

    ‖g_i‖² costs T·p·d by way of g_i, and T²·(p + d) as Σ_ts ⟨left_t, left_s⟩ ⟨right_t, right_s⟩, the Gram form; where
    that is less, the faster of the two is found by measuring. The sum cancels where the vectors do (activations with a
    large mean, gradients with none), so it is taken in a wider dtype and its rounding is bounded:
    |error| ≤ (p + d + T²) u (Σ_t ‖left_t‖ ‖right_t‖)², u the wider dtype's roundoff.
    Samples where that is more than the roundoff of the result, negative sums among them, are taken by way of g_i.
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
        kernels = {"fused": self.squares_fused}
        return fastest(ways, f"norms of {self.geometry()}", self.samples, self.like, kernels)

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

    def squares_by_gram(self) -> Tensor:
        """Return ‖g_i‖² [N] by the Gram form, but for samples where it cancels."""
        (positions, p), d, wider = self.left.shape[1:], self.right.shape[2], WIDER[self.like.dtype]
        roundoff, found = torch.finfo(wider).eps / 2, []
        for some in at_a_time(self.samples, 2 * positions**2 * wider.itemsize, self.like):
            left, right = self.left[some].to(wider), self.right[some].to(wider)
            squares = ((left @ left.mT) * (right @ right.mT)).sum((1, 2))
            most = (left.norm(dim=2) * right.norm(dim=2)).sum(1).square()
            error = (p + d + positions**2) * roundoff * most
            doubtful = ~(error <= torch.finfo(self.like.dtype).eps / 2 * squares)  # NaN is in doubt too
            if doubtful.any():
                squares[doubtful] = squares_of(outer(left[doubtful], right[doubtful]))
            found.append(squares.to(wide(self.like.dtype)))
        return torch.cat(found)


def _norms(vectors: Tensor) -> Tensor:
    """Return the norms [N] of single vectors [N, 1, d], where one may be far larger than its product with another."""
    if vectors.dtype not in WIDER:
        return squares_of(vectors).sqrt_()
    norms: Tensor = torch.linalg.vector_norm(vectors[:, 0], dim=1, dtype=torch.float64)
    return norms


WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def scaled(t: Tensor, factors: Tensor) -> Tensor:
    """Return c_i t_i for factors c [N]; by way of float32 where these may be nearer to 0 than t's dtype comes."""
    factors = factors.view(-1, *[1] * (t.dim() - 1))
    return (t * factors).to(t.dtype) if t.dtype == torch.float16 else t * factors.to(t.dtype)


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return torch.stack(list(parts)).sum(0)


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
    return fastest(ways, f"products {left.shape[2]}×{right.shape[2]}", len(left), left, kernels)


def _outer_by_kernel(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    from backends.ops.kernels import outer_products  # triton need not be installed

    if out is None or not out.is_contiguous():
        made = outer_products(left[:, 0], right[:, 0], left.new_empty(len(left), left.shape[2], right.shape[2]))
        return made if out is None else out.copy_(made)
    return outer_products(left[:, 0], right[:, 0], out)


def at_a_time(samples: int, each: int, like: Tensor) -> list[slice]:
    """Return slices of as many samples as take some megabytes, at `each` bytes a sample, on the device of `like`."""
    return slices(samples, max(1, bytes_at_a_time(like) // max(1, each)))


def bytes_at_a_time(like: Tensor) -> int:
    """Return how many bytes of gradients are made at a time on the device of `like`."""
    return AT_A_TIME.get(like.device.type, AT_A_TIME_ELSEWHERE)
