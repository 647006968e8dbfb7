"""The Gram form of norms: ‖Σ_t left_t right_tᵀ‖² = Σ_ts ⟨left_t, left_s⟩ ⟨right_t, right_s⟩.

As in ghost clipping (Li et al. 2021, https://arxiv.org/abs/2110.05679), which Bu et al. 2022
(https://arxiv.org/abs/2205.10683) take to convolutions: there right vectors are patches. Here these are never made. The
inner product of two patches is the sum of those of their pixels, and other patches, as far from each other, have most
of these pairs of pixels too. So all pixels are multiplied once, and what that gives is added up along its diagonals,
one dimension after another: for K places of the kernel, a K-th of the multiplications.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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


def pairs(images: int, windows: Sequence[Window]) -> int:
    """Return how many pairs of pixels of a sample of so many images `products_of_patches` multiplies."""
    return images**2 * prod(window.pairs() for window in windows)


def products_of_patches(x: Tensor, windows: Sequence[Window]) -> Tensor:
    """Return the inner products [N, T, T] of the patches of x [N, B, C, *pixels], T = B·outputs, without patches."""
    (n, b), dimensions, total = x.shape[:2], len(windows), None
    for firsts in product(*(window.shifts() for window in windows)):
        some = x
        for axis, (first, window) in enumerate(zip(firsts, windows, strict=True)):
            some = some[(slice(None),) * (axis + 3) + (slice(first, None, window.stride),)]
        size = (b, *some.shape[3:])
        found = inner_products(some.movedim(2, -1).flatten(1, -2)).view(n, *size, *size)
        for axis, (first, window) in enumerate(zip(firsts, windows, strict=True)):
            found = _along(found, axis + 2, axis + 3 + dimensions, window.shifts()[first], window.outputs)
        total = found if total is None else total.add_(found)
    assert total is not None  # a kernel has a place
    return total.flatten(1, dimensions + 1).flatten(2)


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


def inner_products(vectors: Tensor) -> Tensor:
    """Return ⟨v_t, v_s⟩ [N, T, T] of [N, T, d], in float32 at least."""
    if vectors.dtype == torch.float64:
        return torch.bmm(vectors, vectors.mT)
    if vectors.dtype == torch.float32 or not vectors.is_cuda:
        vectors = vectors.float()
        return torch.bmm(vectors, vectors.mT)
    return torch.bmm(vectors, vectors.mT, out_dtype=torch.float32)


def sums(lefts: Tensor, rights: Tensor, numbers: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return Σ_ts lefts_ts rights_ts [N], and in which samples its rounding may show in a narrower dtype [N].

    Args:
        lefts: Inner products of vectors with each other [N, T, T].
        rights: Of others.
        numbers: Of a vector of the ones and of the others, together.
        dtype: In which results are wanted.
    """
    squares = (lefts * rights).sum((1, 2))
    left, right = (t.diagonal(dim1=1, dim2=2).sqrt() for t in (lefts, rights))  # lengths
    most = (left * right).sum(1).square()
    error = (numbers + lefts.shape[1] ** 2) * torch.finfo(lefts.dtype).eps / 2 * most
    sure = (error <= torch.finfo(dtype).eps / 2 * squares) & squares.isfinite()  # infinite may be one factor only
    return squares, ~sure
