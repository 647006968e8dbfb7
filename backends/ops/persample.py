"""The per-sample gradients g_i of one parameter, held in whatever form is cheapest, and what is wanted of them.

A form says how to make the gradients of some samples (`rows`). Everything else has a default that makes a few samples
at a time, so that memory stays bounded; a form overrides what it can have for less.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from backends.derived import Moments, default_bytes, rows_of, slices, squares_of, weighted_sum
from backends.heap import LARGEST

AT_A_TIME = {"cpu": 2**21}
"""Bytes of gradients made at a time where they are not the result: on a CPU they stay in its cache."""

AT_A_TIME_ELSEWHERE = 2**25  # a GPU has as much as that in its cache; in ResNet-18, twice as much was beyond 1.3 steps

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

    def add_to(self, total: Tensor, some: slice) -> None:
        """Add the gradients of some samples to a tensor [n, *shape]."""
        total += self.rows(some)

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


WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def scaled(t: Tensor, factors: Tensor) -> Tensor:
    """Return c_i t_i for factors c [N]; by way of float32 where these may be nearer to 0 than t's dtype comes."""
    factors = factors.view(-1, *[1] * (t.dim() - 1))
    return (t * factors).to(t.dtype) if t.dtype == torch.float16 else t * factors.to(t.dtype)


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return torch.stack(list(parts)).sum(0)


def at_a_time(samples: int, each: int, like: Tensor) -> list[slice]:
    """Return slices of as many samples as take some megabytes, at `each` bytes a sample, on the device of `like`."""
    return slices(samples, max(1, bytes_at_a_time(like) // max(1, each)))


def bytes_at_a_time(like: Tensor) -> int:
    """Return how many bytes of gradients are made at a time on the device of `like`."""
    return AT_A_TIME.get(like.device.type, AT_A_TIME_ELSEWHERE)
