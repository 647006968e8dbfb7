"""Triton kernels for norms of per-sample gradients of convolutions and linear layers, and for outer products.

Of a convolution, an implicit matrix product (implicit GEMM, as in cuDNN: Chetlur et al. 2014,
https://arxiv.org/abs/1410.0759) for each sample: w_i[p, q] = Σ_r y_i[p, r] x_i[r, q], where r goes over images and
output pixels, q over channels and places of the kernel, and x is read where the convolution reads it, so that there are
no patches. Of a linear layer, or of patches, the product of two matrices for each sample. Norms come of tiles that are
never written: in bfloat16 that takes 0.4 times what writing and reading gradients does (H100, layers of ViT-B/16).

They are among the ways that are measured, and where float32 is not rounded to TF32, they are as exact as float32: by
six products of parts in bfloat16, or in float32 itself. Not in float64.
"""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Product:
    """What the kernel multiplies.

    Attributes:
        x: [N, B, C, *size], B images a sample, of one to three dimensions; any strides.
        y: [N, B, P, *out]; any strides.
        kernel: Its width in each dimension.
        stride: In each dimension.
        padding: In each dimension.
        dilation: In each dimension.
        groups: Groups of channels.
    """

    x: Tensor
    y: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", _within_reach(self.x))
        object.__setattr__(self, "y", _within_reach(self.y))

    def squares(self) -> Tensor:
        """Return ‖g_i‖² [N], in float32; no gradient is written."""
        p, q = self.y.shape[2] // self.groups, self.x.shape[2] // self.groups * prod(self.kernel)
        height, width = _fitting(p, LARGEST), _fitting(q, LARGEST if p > LARGEST else LARGEST // 2)  # fastest on H100
        down, across = triton.cdiv(p, height), triton.cdiv(q, width)
        out = self.y.new_empty(len(self.y), self.groups * down * across, dtype=torch.float32)
        with torch.cuda.device_of(self.y):
            _product[(out.numel(),)](
                self.x,
                self.y,
                out,
                (*self.x.stride()[:3], *_three(self.x.stride()[3:], 0)),
                (*self.y.stride()[:3], *_three(self.y.stride()[3:], 0)),
                _three(self.x.shape[3:], 1),
                _three(self.y.shape[3:], 1),
                _three(self.kernel, 1),
                _three(self.stride, 1),
                _three(self.padding, 0),
                _three(self.dilation, 1),
                self.y.shape[2] // self.groups,
                self.x.shape[2] // self.groups,
                self.y.shape[1] * prod(self.y.shape[3:]),
                self.groups,
                down,
                across,
                HEIGHT=height,
                WIDTH=width,
                DEPTH=DEPTH,
                PRECISION="tf32" if self.x.is_cuda and precision.tf32_in_convolutions() else "ieee",
                num_warps=_warps(height, width),
                num_stages=STAGES,
            )
        return out.sum(1)


def squares_of_products(left: Tensor, right: Tensor) -> Tensor:
    """Return ‖Σ_t left_it right_itᵀ‖² [N], in float32, of [N, T, p] and [N, T, d] with any strides."""
    left, right = _within_reach(left), _within_reach(right)
    (n, length, p), d = left.shape, right.shape[2]
    wide = left.dtype == torch.float32
    height, width = _fitting(p, LARGEST), _fitting(d, LARGEST)
    down, across = triton.cdiv(p, height), triton.cdiv(d, width)
    out = left.new_empty(n, down * across, dtype=torch.float32)
    with torch.cuda.device_of(left):  # Triton launches on the current device
        _squares[(out.numel(),)](
            left,
            right,
            out,
            left.stride(),
            right.stride(),
            p,
            d,
            length,
            down,
            across,
            HEIGHT=height,
            WIDTH=width,
            DEPTH=DEPTH,
            PRECISION=_precision(left, right) if wide else "ieee",
            num_warps=_warps(height, width) if wide else 4,
            num_stages=STAGES,
        )
    return out.sum(1)


def outer_products(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write left_i right_iᵀ of [N, p] and [N, d] with any strides into a contiguous [N, p, d], and return it."""
    left, right, _ = _within_reach(left), _within_reach(right), _within_reach(out)
    (n, p), d = left.shape, right.shape[1]
    width = _fitting(d, WRITTEN)
    height = WRITTEN // width * ROWS
    down, across = triton.cdiv(p, height), triton.cdiv(d, width)
    with torch.cuda.device_of(left):
        _outer[(n * down * across,)](
            left, right, out, left.stride(), right.stride(), p, d, down, across, HEIGHT=height, WIDTH=width
        )
    return out


def _within_reach(t: Tensor) -> Tensor:
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


def _precision(left: Tensor, right: Tensor) -> str:
    """Return how float32 is multiplied: TF32 wants T to be the last axis in memory, else parts in bfloat16 are faster.

    Six products of three parts each are as exact as float32; three of two parts are more exact than TF32.
    """
    if not left.is_cuda:
        return "ieee"  # the interpreter knows no other
    if not precision.tf32_in_products():
        return "bf16x6"
    return "tf32" if left.stride(1) == right.stride(1) == 1 else "bf16x3"


def _fitting(size: int, most: int) -> int:
    """Return the power of two from 16 on that holds so many, or the most."""
    return int(min(most, max(16, triton.next_power_of_2(size))))


def _warps(height: int, width: int) -> int:
    return 8 if height * width > LARGEST * LARGEST // 2 else 4


def _three(numbers: tuple[int, ...] | torch.Size, missing: int) -> tuple[int, ...]:
    """Return an option of up to three dimensions as one of three."""
    return (*[missing] * (3 - len(numbers)), *numbers)


# ruff: noqa: ANN001, ANN202  below, arguments are pointers, numbers and tuples of Triton's
@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
    out_ptr,
    x_stride,
    y_stride,
    size,
    out_size,
    kernel,
    stride,
    padding,
    dilation,
    p_each,
    c_each,
    length,
    groups,
    down,
    across,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one sample's gradient, in one group; names of tuples are those of `Product`."""
    tile = tl.program_id(0)
    sample, tile = tile // (groups * down * across), tile % (groups * down * across)
    group, of_group = tile // (down * across), tile % (down * across)
    p = of_group // across * HEIGHT + tl.arange(0, HEIGHT)
    q = of_group % across * WIDTH + tl.arange(0, WIDTH)
    places = kernel[0] * kernel[1] * kernel[2]
    c, place = q // places, q % places
    first_d = place // (kernel[1] * kernel[2]) * dilation[0] - padding[0]
    first_h = place // kernel[2] % kernel[1] * dilation[1] - padding[1]
    first_w = place % kernel[2] * dilation[2] - padding[2]
    x_ptr += sample.to(tl.int64) * x_stride[0] + group * c_each * x_stride[2]
    y_ptr += sample.to(tl.int64) * y_stride[0] + group * p_each * y_stride[2]
    found = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for start in range(0, length, DEPTH):
        r = start + tl.arange(0, DEPTH)
        w, h = r % out_size[2], r // out_size[2] % out_size[1]
        d, image = r // (out_size[2] * out_size[1]) % out_size[0], r // (out_size[2] * out_size[1] * out_size[0])
        y_at = image * y_stride[1] + d * y_stride[3] + h * y_stride[4] + w * y_stride[5]
        y_in = (p < p_each)[:, None] & (r < length)[None, :]
        y = tl.load(y_ptr + p[:, None] * y_stride[2] + y_at[None, :], mask=y_in, other=0.0)
        x_d = d[:, None] * stride[0] + first_d[None, :]
        x_h = h[:, None] * stride[1] + first_h[None, :]
        x_w = w[:, None] * stride[2] + first_w[None, :]
        x_in = (r < length)[:, None] & (c < c_each)[None, :]
        x_in = x_in & (x_d >= 0) & (x_d < size[0]) & (x_h >= 0) & (x_h < size[1]) & (x_w >= 0) & (x_w < size[2])
        x_at = (image * x_stride[1])[:, None] + (c * x_stride[2])[None, :]
        x_at += x_d * x_stride[3] + x_h * x_stride[4] + x_w * x_stride[5]
        x = tl.load(x_ptr + x_at, mask=x_in, other=0.0)
        found = tl.dot(y, x, found, input_precision=PRECISION)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.sum(found * found, 1), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _squares(  # type: ignore[no-untyped-def]
    left_ptr,
    right_ptr,
    out_ptr,
    left_stride,
    right_stride,
    p,
    d,
    length,
    down,
    across,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one tile of one sample's gradient adds to ‖g_i‖²."""
    sample, tile = (tl.program_id(0) // (down * across)).to(tl.int64), tl.program_id(0) % (down * across)
    i = tile // across * HEIGHT + tl.arange(0, HEIGHT)
    j = tile % across * WIDTH + tl.arange(0, WIDTH)
    left_ptr += sample * left_stride[0]
    right_ptr += sample * right_stride[0]
    found = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for start in range(0, length, DEPTH):
        t = start + tl.arange(0, DEPTH)
        left_in = (t < length)[None, :] & (i < p)[:, None]
        left = tl.load(left_ptr + t[None, :] * left_stride[1] + i[:, None] * left_stride[2], mask=left_in, other=0.0)
        right_in = (t < length)[:, None] & (j < d)[None, :]
        right = tl.load(
            right_ptr + t[:, None] * right_stride[1] + j[None, :] * right_stride[2], mask=right_in, other=0.0
        )
        found = tl.dot(left, right, found, input_precision=PRECISION)
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.sum(found * found, 1), 0))


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
