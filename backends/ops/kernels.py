"""Triton kernels for norms of per-sample gradients of linear layers, or of patches, and for outer products.

For each sample, the product of two matrices. Norms come of tiles that are never written: in bfloat16 that takes 0.4
times what writing and reading gradients does (H100, layers of ViT-B/16).

They are among the ways that are measured, and where float32 is not rounded to TF32, they are as exact as float32: by
six products of parts in bfloat16. Not in float64.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from backends import precision

LARGEST = 128  # rows and columns of a tile at most
DEPTH = 32  # products added at a time
WRITTEN, ROWS = 1024, 8  # numbers that a program writes in a row, and rows, of outer products
FARTHEST = 2**31 - 1 - LARGEST * DEPTH  # numbers from the first of a sample, with room for what is masked
STAGES = 3  # of loads that are under way
FEW = 8  # programs of a sample at most, where most have nothing to do: starting them is what takes the time


def squares_of_products(
    left: Tensor, right: Tensor, known: Tensor | None = None, allowed: float = 0.0, few: bool = False
) -> Tensor:
    """Return ‖Σ_t left_it right_itᵀ‖² [N], in float32, of [N, T, p] and [N, T, d] with any strides.

    Args:
        left: [N, T, p].
        right: [N, T, d].
        known: Float64 [N, 2, any]: what adds up to each sample's result, if that is known already, and to the square of
            its error.
        allowed: The largest error, relative to the result, with which a known one is taken: then it costs nothing.
        few: Whether a few programs share the tiles of a sample, if its result is not known: a kernel of its own.
    """
    left, right = within_reach(left), within_reach(right)
    (n, length, p), d = left.shape, right.shape[2]
    wide = left.dtype == torch.float32
    height, width = fitting(p, LARGEST), fitting(d, LARGEST)
    down, across = triton.cdiv(p, height), triton.cdiv(d, width)
    options = {
        "HEIGHT": height,
        "WIDTH": width,
        "DEPTH": DEPTH,
        "PRECISION": _precision(left, right),
        "num_warps": warps_for(height, width) if wide else 4,
        "num_stages": STAGES,
    }
    programs = min(down * across, FEW) if few else down * across
    out = left.new_empty(n, programs, dtype=torch.float32)
    addends = 0 if known is None else known.shape[2]
    options["KNOWN"] = triton.next_power_of_2(addends)
    pointers = (left, right, out, out if known is None else known)
    arguments = (*pointers, left.stride(), right.stride(), p, d, length, down, across, addends, allowed)
    with torch.cuda.device_of(left):  # Triton launches on the current device
        if few:
            _squares_by_few[(out.numel(),)](*arguments, programs, **options)
        else:
            _squares[(out.numel(),)](*arguments, **options)
    return out.sum(1)


def outer_products(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write left_i right_iᵀ of [N, p] and [N, d] with any strides into a contiguous [N, p, d], and return it."""
    left, right, _ = within_reach(left), within_reach(right), within_reach(out)
    (n, p), d = left.shape, right.shape[1]
    width = fitting(d, WRITTEN)
    height = WRITTEN // width * ROWS
    down, across = triton.cdiv(p, height), triton.cdiv(d, width)
    with torch.cuda.device_of(left):
        _outer[(n * down * across,)](
            left, right, out, left.stride(), right.stride(), p, d, down, across, HEIGHT=height, WIDTH=width
        )
    return out


def within_reach(t: Tensor) -> Tensor:
    """Return a tensor [N, ...] of whose samples a kernel can count the numbers in 32 bits: this one, or a copy.

    Where samples are on another axis, those of a sample may be far from each other.

    Raises:
        ValueError: There are too many of them.
    """
    farthest = sum((size - 1) * stride for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True))
    if farthest < FARTHEST:
        return t
    if prod(t.shape[1:]) > FARTHEST:
        raise ValueError(f"a sample of {prod(t.shape[1:])} numbers is too large for a kernel; at most {FARTHEST}")
    return t.contiguous()


def exact(like: Tensor) -> str:
    """Return how numbers of a dtype are multiplied as exactly as in it, by Triton's names.

    Six products of three parts in bfloat16 each are as exact as float32, and faster.
    """
    return "bf16x6" if like.is_cuda and like.dtype == torch.float32 else "ieee"  # all that the interpreter knows


def _precision(left: Tensor, right: Tensor) -> str:
    """Return how float32 is multiplied: TF32 wants T to be the last axis in memory, else parts in bfloat16 are faster.

    Three products of two parts are more exact than TF32.
    """
    if not left.is_cuda or left.dtype != torch.float32 or not precision.tf32_in_products():
        return exact(left)
    return "tf32" if left.stride(1) == right.stride(1) == 1 else "bf16x3"


def fitting(size: int, most: int) -> int:
    """Return the power of two from 16 on that holds so many, or the most."""
    return int(min(most, max(16, triton.next_power_of_2(size))))


def warps_for(height: int, width: int) -> int:
    """Return how many warps a program with such a tile has."""
    return 8 if height * width > LARGEST * LARGEST // 2 else 4


# ruff: noqa: ANN001, ANN201, ANN202  below, arguments are pointers, numbers and tuples of Triton's
@triton.jit  # type: ignore[untyped-decorator]
def _squares(  # type: ignore[no-untyped-def]
    left_ptr,
    right_ptr,
    out_ptr,
    known_ptr,
    left_stride,
    right_stride,
    p,
    d,
    length,
    down,
    across,
    addends,
    allowed,
    KNOWN: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one tile of one sample's gradient adds to ‖g_i‖², if that is not known exactly enough."""
    sample, tile = (tl.program_id(0) // (down * across)).to(tl.int64), tl.program_id(0) % (down * across)
    i = tile // across * HEIGHT + tl.arange(0, HEIGHT)
    j = tile % across * WIDTH + tl.arange(0, WIDTH)
    left_ptr += sample * left_stride[0]
    right_ptr += sample * right_stride[0]
    if KNOWN > 0:
        known, sure = known_of(known_ptr, sample, addends, allowed, KNOWN)
        length = tl.where(sure, 0, length)
    found = _tile(left_ptr, right_ptr, left_stride, right_stride, p, d, length, i, j, DEPTH, PRECISION)
    squares = tl.sum(tl.sum(found * found, 1), 0)
    if KNOWN > 0:
        squares = tl.where(sure & (tile == 0), known.to(tl.float32), squares)
    tl.store(out_ptr + tl.program_id(0), squares)


@triton.jit  # type: ignore[untyped-decorator]
def _squares_by_few(  # type: ignore[no-untyped-def]
    left_ptr,
    right_ptr,
    out_ptr,
    known_ptr,
    left_stride,
    right_stride,
    p,
    d,
    length,
    down,
    across,
    addends,
    allowed,
    programs,
    KNOWN: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What some tiles of one sample's gradient add to ‖g_i‖², where that is not known exactly enough."""
    sample, first = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    left_ptr += sample * left_stride[0]
    right_ptr += sample * right_stride[0]
    known, sure = known_of(known_ptr, sample, addends, allowed, KNOWN)
    total = tl.where(sure & (first == 0), known.to(tl.float32), 0.0)
    for tile in range(first, tl.where(sure, 0, down * across), programs):
        i = tile // across * HEIGHT + tl.arange(0, HEIGHT)
        j = tile % across * WIDTH + tl.arange(0, WIDTH)
        found = _tile(left_ptr, right_ptr, left_stride, right_stride, p, d, length, i, j, DEPTH, PRECISION)
        total += tl.sum(tl.sum(found * found, 1), 0)
    tl.store(out_ptr + tl.program_id(0), total)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    left_ptr,
    right_ptr,
    left_stride,
    right_stride,
    p,
    d,
    length,
    i,
    j,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows i and columns j of one sample's gradient."""
    found = tl.zeros((i.shape[0], j.shape[0]), dtype=tl.float32)
    for start in range(0, length, DEPTH):
        t = start + tl.arange(0, DEPTH)
        left_in = (t < length)[None, :] & (i < p)[:, None]
        left = tl.load(left_ptr + t[None, :] * left_stride[1] + i[:, None] * left_stride[2], mask=left_in, other=0.0)
        right_in = (t < length)[:, None] & (j < d)[None, :]
        right = tl.load(
            right_ptr + t[:, None] * right_stride[1] + j[None, :] * right_stride[2], mask=right_in, other=0.0
        )
        found = tl.dot(left, right, found, input_precision=PRECISION)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def known_of(known_ptr, sample, addends, allowed, KNOWN: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is known of a sample's ‖g_i‖², and whether that is exact enough to be taken."""
    each = tl.arange(0, KNOWN)
    known_ptr += sample * 2 * addends
    known = tl.sum(tl.load(known_ptr + each, mask=each < addends, other=0.0), 0)
    error = tl.sum(tl.load(known_ptr + addends + each, mask=each < addends, other=0.0), 0)
    return known, error < allowed * allowed * known * known  # not where one is infinite or NaN


@triton.jit  # type: ignore[untyped-decorator]
def _outer(  # type: ignore[no-untyped-def]
    left_ptr,
    right_ptr,
    out_ptr,
    left_stride,
    right_stride,
    p,
    d,
    down,
    across,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One tile of one sample's outer product; torch's own product of broadcast factors takes twice as long (H100)."""
    sample, tile = (tl.program_id(0) // (down * across)).to(tl.int64), tl.program_id(0) % (down * across)
    i = tile // across * HEIGHT + tl.arange(0, HEIGHT)
    j = tile % across * WIDTH + tl.arange(0, WIDTH)
    left = tl.load(left_ptr + sample * left_stride[0] + i * left_stride[1], mask=i < p, other=0.0)
    right = tl.load(right_ptr + sample * right_stride[0] + j * right_stride[1], mask=j < d, other=0.0)
    inside = (i < p)[:, None] & (j < d)[None, :]
    tl.store(out_ptr + sample * p * d + i[:, None] * d + j[None, :], left[:, None] * right[None, :], mask=inside)
