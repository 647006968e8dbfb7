"""Norms of per-sample gradients by the Gram form: ‖Σ_t left_t right_tᵀ‖² = Σ_ts ⟨left_t, left_s⟩ ⟨right_t, right_s⟩.

Inner products are the library's (`gram.py`), or by a kernel that makes the half of them which symmetry leaves; another
kernel sums what they give. The sum cancels where the vectors do, so its rounding is estimated beside it, from the same
numbers: an inner product of K numbers is off by some √K roundings of the product of its vectors' lengths, each
independently of the others, so that

    error² ≈ Σ_t≤s w² (r_p² ‖left_t‖² ‖left_s‖² ⟨right_t, right_s⟩² + r_d² ‖right_t‖² ‖right_s‖² ⟨left_t, left_s⟩²),

where w is how often the sum has a pair, once or twice. In ViT-B/16 and GPT-2 that is some 20 times the error. Patches
share products of pixels, and so their errors; even if all of these had the same direction the estimate would hold.

What factors are rounded to (TF32) is no part of it: it is as if vectors were rounded, whose product is then as far off.
Samples whose estimate is more than the caller allows are taken by way of the product, by a kernel that does nothing for
the others. So nothing waits for the host, and a CUDA graph can record it.
"""

from math import isqrt, sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

from backends import precision
from backends.ops.gram import inner_products
from backends.ops.kernels import (
    DEPTH,
    FARTHEST,
    LARGEST,
    STAGES,
    exact,
    fitting,
    squares_of_products,
    warps_for,
    within_reach,
)
from backends.ops.persample import at_a_time

ROWS, COLUMNS = 16, 64  # inner products of a tile at most, where they are summed: more do not fit into registers
CUT_OFF = 2.0**-23  # of float32, where tensor cores add: always towards zero
ROUNDED = 2.0**-24  # and where they do not, or 32 numbers at a time, as in the kernel
SMALLEST = 2.0**-102  # products of lengths below which float32 has no numbers for their roundings


def squares_by_gram(left: Tensor, right: Tensor, allowed: float, by_kernel: bool = False, few: bool = False) -> Tensor:
    """Return ‖Σ_t left_it right_itᵀ‖² [N], in float32, of [N, T, p] and [N, T, d] with any strides.

    Args:
        left: Float32 or half precision, as `right`.
        right: On the same device.
        allowed: The largest estimate of the rounding, relative to the result, with which the Gram form is taken.
        by_kernel: Whether the kernel makes inner products: as exactly as in float32, also where TF32 is allowed.
        few: Whether a few programs see to each sample that is in doubt.

    Raises:
        ValueError: There are too many vectors for their inner products to be counted in 32 bits.
    """
    if left.shape[2] < right.shape[2]:
        left, right = right, left  # what takes longer is begun first
    left, right = within_reach(left), within_reach(right)
    parts = at_a_time(len(left), 8 * left.shape[1] ** 2, left)
    found = [_of_some(left[some], right[some], allowed, by_kernel, few) for some in parts]
    return torch.cat(found) if len(found) > 1 else found[0]


def _of_some(left: Tensor, right: Tensor, allowed: float, by_kernel: bool, few: bool) -> Tensor:
    _countable(left.shape[1])
    lefts, rights = _halves(left, right) if by_kernel else (inner_products(left), inner_products(right))
    exactly = left.dtype == torch.float32 and (by_kernel or not precision.tf32_in_products())
    known = sums_and_errors(lefts, rights, (left.shape[2], right.shape[2]), exactly)
    return squares_of_products(left, right, known, allowed, few)


def sums_and_errors(lefts: Tensor, rights: Tensor, numbers: tuple[int, int], exactly: bool) -> Tensor:
    """Return what adds up to Σ_ts lefts_ts rights_ts, and to the square of its error, in float64 [N, 2, any].

    Args:
        lefts: Inner products [N, T, T], contiguous, in float32; only those with t ≤ s are read.
        rights: Of other vectors.
        numbers: Of each of the vectors behind them.
        exactly: Whether products were rounded, not cut off.

    Raises:
        ValueError: There are too many to be counted in 32 bits.
    """
    n, length, _ = lefts.shape
    _countable(length)
    rows, columns = fitting(length, ROWS), fitting(length, COLUMNS)
    blocks = triton.cdiv(length, rows)
    sums = lefts.new_empty(n, 2, blocks, dtype=torch.float64)
    rounded = ROUNDED if exactly else CUT_OFF
    with torch.cuda.device_of(lefts):  # Triton launches on the current device
        _sums[(n * blocks,)](
            lefts,
            rights,
            sums,
            *(_roundings(each, rounded) for each in numbers),
            length,
            blocks,
            ROWS=rows,
            COLUMNS=columns,
            SMALLEST=SMALLEST,
        )
    return sums


def _countable(length: int) -> None:
    if length**2 > FARTHEST:
        raise ValueError(f"{length} vectors of a sample are too many for a kernel; at most {isqrt(FARTHEST)}")


def _halves(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return inner products of the vectors of each sample, twice [N, T, T]; of a pair of tiles only one is written."""
    (n, length, p), d = left.shape, right.shape[2]
    size = fitting(length, LARGEST)
    tiles = triton.cdiv(length, size)
    lefts, rights = (left.new_empty(n, length, length, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(left):
        _upper[(2 * n * tiles * tiles,)](
            left,
            right,
            lefts,
            rights,
            left.stride(),
            right.stride(),
            p,
            d,
            n,
            length,
            tiles,
            SIZE=size,
            DEPTH=DEPTH,
            PRECISION=exact(left),
            num_warps=warps_for(size, size),
            num_stages=STAGES,
        )
    return lefts, rights


def _roundings(numbers: int, rounded: float) -> float:
    """Return by how much an inner product is off, relative to lengths; what is cut off adds up."""
    return rounded * (sqrt(numbers) + (numbers / 32 if rounded == CUT_OFF else 0))


# ruff: noqa: ANN001, ANN202  below, arguments are pointers and numbers of Triton's
@triton.jit  # type: ignore[untyped-decorator]
def _sums(  # type: ignore[no-untyped-def]
    lefts_ptr,
    rights_ptr,
    out_ptr,
    left_roundings,
    right_roundings,
    length,
    blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """What some rows of inner products add to a sample's sum, and to the square of its error."""
    sample, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    lefts_ptr += sample * length * length
    rights_ptr += sample * length * length
    i = block * ROWS + tl.arange(0, ROWS)
    left_i = tl.sqrt(tl.load(lefts_ptr + i * (length + 1), mask=i < length, other=0.0))
    right_i = tl.sqrt(tl.load(rights_ptr + i * (length + 1), mask=i < length, other=0.0))
    found = tl.zeros((ROWS, COLUMNS), dtype=tl.float64)
    error = tl.zeros((ROWS, COLUMNS), dtype=tl.float64)
    for start in range(block * ROWS // COLUMNS * COLUMNS, length, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        left_j = tl.sqrt(tl.load(lefts_ptr + j * (length + 1), mask=j < length, other=0.0))
        right_j = tl.sqrt(tl.load(rights_ptr + j * (length + 1), mask=j < length, other=0.0))
        upper = (i[:, None] <= j[None, :]) & (j < length)[None, :]
        at = i[:, None] * length + j[None, :]
        left = tl.load(lefts_ptr + at, mask=upper, other=0.0).to(tl.float64)
        right = tl.load(rights_ptr + at, mask=upper, other=0.0).to(tl.float64)
        times = upper.to(tl.float64) + (i[:, None] < j[None, :]).to(tl.float64)
        by_left = times * left_roundings * (left_i[:, None] * left_j[None, :] + SMALLEST) * right
        by_right = times * right_roundings * (right_i[:, None] * right_j[None, :] + SMALLEST) * left
        found += times * left * right
        error += by_left * by_left + by_right * by_right
    out_ptr += sample * 2 * blocks + block
    tl.store(out_ptr, tl.sum(tl.sum(found, 1), 0))
    tl.store(out_ptr + blocks, tl.sum(tl.sum(error, 1), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _upper(  # type: ignore[no-untyped-def]
    left_ptr,
    right_ptr,
    lefts_ptr,
    rights_ptr,
    left_stride,
    right_stride,
    p,
    d,
    n,
    length,
    tiles,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one sample's inner products, of the left vectors and then of the right ones."""
    tile = tl.program_id(0)
    if tile < n * tiles * tiles:
        _tile(left_ptr, lefts_ptr, left_stride, tile, p, length, tiles, SIZE, DEPTH, PRECISION)
    else:
        tile -= n * tiles * tiles
        _tile(right_ptr, rights_ptr, right_stride, tile, d, length, tiles, SIZE, DEPTH, PRECISION)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    ptr,
    out_ptr,
    stride,
    tile,
    numbers,
    length,
    tiles,
    SIZE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one sample's inner products, if it is on the diagonal or above."""
    sample, tile = (tile // (tiles * tiles)).to(tl.int64), tile % (tiles * tiles)
    row, column = tile // tiles, tile % tiles
    ptr += sample * stride[0]
    i, j = row * SIZE + tl.arange(0, SIZE), column * SIZE + tl.arange(0, SIZE)
    found = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    numbers = tl.where(row <= column, numbers, 0)
    for start in range(0, numbers, DEPTH):
        k = start + tl.arange(0, DEPTH)
        a_in = (i < length)[:, None] & (k < numbers)[None, :]
        a = tl.load(ptr + i[:, None] * stride[1] + k[None, :] * stride[2], mask=a_in, other=0.0)
        b_in = (j < length)[None, :] & (k < numbers)[:, None]
        b = tl.load(ptr + j[None, :] * stride[1] + k[:, None] * stride[2], mask=b_in, other=0.0)
        found = tl.dot(a, b, found, input_precision=PRECISION)
    end = tl.where(row <= column, length, 0)  # a mask of a tile and a scalar has no dtype in Triton 3.9's interpreter
    inside = (i < end)[:, None] & (j < length)[None, :]
    tl.store(out_ptr + sample * length * length + i[:, None] * length + j[None, :], found, mask=inside)
