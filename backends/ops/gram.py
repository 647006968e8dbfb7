"""The Gram form of norms: ‖Σ_t left_t right_tᵀ‖² = Σ_ts ⟨left_t, left_s⟩ ⟨right_t, right_s⟩.

As in ghost clipping (Li et al. 2021, https://arxiv.org/abs/2110.05679), which Bu et al. 2022
(https://arxiv.org/abs/2205.10683) take to convolutions: there right vectors are patches. Here these are never made. The
inner product of two patches is the sum of those of their pixels, and other patches, as far from each other, have most
of these pairs of pixels too. So all pixels are multiplied once, and what that gives is added up along its diagonals,
one dimension after another: for K places of the kernel, a K-th of the multiplications.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """How a convolution reads its input in one dimension: place k of output r is pixel r·stride + k·dilation − padding.

    Attributes:
        width: Places of the kernel.
        stride: Pixels from an output to the next.
        padding: Zeros in front of the first pixel.
        dilation: Pixels from a place to the next.
        pixels: Of the input.
        outputs: Of the convolution.
    """

    width: int
    stride: int
    padding: int
    dilation: int
    pixels: int
    outputs: int

    def shifts(self) -> dict[int, list[int]]:
        """Return where places are, in strides, by their remainder: two pixels of one pair have the same one."""
        found: dict[int, list[int]] = {}
        for place in range(self.width):
            strides, remainder = divmod(place * self.dilation - self.padding, self.stride)
            found.setdefault(remainder, []).append(strides)
        return found

    def pairs(self) -> int:
        """Return how many pairs of pixels are multiplied."""
        return sum(len(range(first, self.pixels, self.stride)) ** 2 for first in self.shifts())


@lru_cache
def pairs(images: int, windows: tuple[Window, ...]) -> int:
    """Return how many pairs of pixels of a sample of so many images `products_of_patches` multiplies."""
    return images**2 * prod(window.pairs() for window in windows)


def products_of_patches(x: Tensor, windows: Sequence[Window], others: Tensor | None = None) -> Tensor:
    """Return inner products of patches, without patches.

    Args:
        x: [N, B, C, *pixels].
        windows: How they are read, in each dimension.
        others: Of these with those of x [N, S, C, *pixels]; x itself by default.

    Returns:
        [N, B·outputs, S·outputs].
    """
    dimensions, total = len(windows), None
    for firsts in product(*(window.shifts() for window in windows)):
        vectors = [_every(t, firsts, windows) for t in ((x,) if others is None else (x, others))]
        sizes = [size for t in (vectors[0], vectors[-1]) for size in t.shape[1:-1]]
        found = inner_products(*(t.flatten(1, -2) for t in vectors)).view(len(x), *sizes)
        for axis, (first, window) in enumerate(zip(firsts, windows, strict=True)):
            found = _along(found, axis + 2, axis + 3 + dimensions, window.shifts()[first], window.outputs)
        total = found if total is None else total.add_(found)
    assert total is not None  # a kernel has a place
    return total.flatten(1, dimensions + 1).flatten(2)


def _every(x: Tensor, firsts: Sequence[int], windows: Sequence[Window]) -> Tensor:
    """Return the pixels with a remainder in each dimension, [N, B, *some pixels, C]."""
    for axis, (first, window) in enumerate(zip(firsts, windows, strict=True)):
        x = x[(slice(None),) * (axis + 3) + (slice(first, None, window.stride),)]
    return x.movedim(2, -1)


def _along(products: Tensor, one: int, other: int, shifts: list[int], outputs: int) -> Tensor:
    """Add up products of pixels along the diagonals of two axes: for outputs r and s, those at r + shift, s + shift."""
    pixels = products.shape[one]
    if shifts == [0] and pixels == outputs:
        return products
    shape = list(products.shape)
    shape[one] = shape[other] = outputs
    found = products.new_zeros(shape)
    for shift in shifts:
        first, many = max(0, -shift), min(outputs, pixels - shift) - max(0, -shift)
        if many > 0:
            read = products.narrow(one, first + shift, many).narrow(other, first + shift, many)
            found.narrow(one, first, many).narrow(other, first, many).add_(read)
    return found


def inner_products(vectors: Tensor, others: Tensor | None = None) -> Tensor:
    """Return ⟨v_t, w_s⟩ [N, T, S] of [N, T, d] and [N, S, d], the same ones by default; in float32 at least."""
    others = vectors if others is None else others
    if vectors.dtype in (torch.float32, torch.float64):
        return torch.bmm(vectors, others.mT)
    if vectors.is_cuda:
        return torch.bmm(vectors, others.mT, out_dtype=torch.float32)
    return torch.bmm(vectors.float(), others.float().mT)


def sums(lefts: Tensor, rights: Tensor, numbers: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return Σ_ts lefts_ts rights_ts [N], and in which samples its rounding may show in a narrower dtype [N].

    Args:
        lefts: Inner products of vectors with each other [N, T, T].
        rights: Of others.
        numbers: Of a vector of the ones and of the others, together.
        dtype: In which results are wanted.
    """
    squares = (lefts * rights).sum((1, 2))
    lengths = lefts.diagonal(dim1=1, dim2=2).sqrt() * rights.diagonal(dim1=1, dim2=2).sqrt()
    return squares, ~exact(squares, lengths, numbers, dtype)


def exact(squares: Tensor, lengths: Tensor, numbers: int, dtype: torch.dtype) -> Tensor:
    """Return in which samples rounding cannot show [N]; there neither in products of two of them.

    Args:
        squares: ‖g_i‖² [N], by the Gram form.
        lengths: ‖left_t‖ ‖right_t‖ [N, T].
        numbers: Of a vector of the ones and of the others, together.
        dtype: In which results are wanted.
    """
    error = (numbers + lengths.shape[1] ** 2) * torch.finfo(squares.dtype).eps / 2 * lengths.sum(1).square()
    return (error <= torch.finfo(dtype).eps / 2 * squares) & squares.isfinite()  # infinite may be one factor only
