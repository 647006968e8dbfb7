"""A Triton kernel for per-sample gradients of convolutions, and for their norms.

An implicit matrix product (implicit GEMM, as in cuDNN: Chetlur et al. 2014, https://arxiv.org/abs/1410.0759) for each
sample: w_i[p, q] = Σ_r y_i[p, r] x_i[r, q], where r goes over images and output pixels, q over channels and places of
the kernel, and x is read where the convolution reads it, so that there are no patches. Norms come of tiles that are
never written. See `kernels.py` for what the results are like.
"""

from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from backends import precision
from backends.ops.kernels import DEPTH, FEW, LARGEST, STAGES, exact, fitting, known_of, warps_for, within_reach


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
        object.__setattr__(self, "x", within_reach(self.x))
        object.__setattr__(self, "y", within_reach(self.y))

    def squares(self, known: Tensor | None = None, allowed: float = 0.0) -> Tensor:
        """Return ‖g_i‖² [N], in float32; no gradient is written.

        Args:
            known: What is known already; see `kernels.squares_of_products`.
            allowed: The largest error, relative to the result, with which it is taken.
        """
        return self._tiles(None, known, allowed).sum(1)

    def grads(self) -> Tensor:
        """Return g_i [N, P, C / groups, *kernel]."""
        shape = (len(self.y), self.y.shape[2], self.x.shape[2] // self.groups, *self.kernel)
        out = within_reach(self.y.new_empty(shape))
        self._tiles(out)
        return out

    def _tiles(self, out: Tensor | None, known: Tensor | None = None, allowed: float = 0.0) -> Tensor:
        """Write gradients, or return what each tile of them adds to ‖g_i‖² [N, tiles]."""
        p, q = self.y.shape[2] // self.groups, self.x.shape[2] // self.groups * prod(self.kernel)
        height, width = fitting(p, LARGEST), fitting(q, LARGEST if p > LARGEST else LARGEST // 2)  # fastest on H100
        down, across = triton.cdiv(p, height), triton.cdiv(q, width)
        tiles = self.groups * down * across
        programs = tiles if known is None else min(tiles, FEW)
        squares = self.y.new_empty(len(self.y), programs, dtype=torch.float32)
        tf32 = self.x.is_cuda and self.x.dtype == torch.float32 and precision.tf32_in_convolutions()
        arguments = (
            self.x,
            self.y,
            squares if out is None else out,
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
        )
        options = {
            "HEIGHT": height,
            "WIDTH": width,
            "DEPTH": DEPTH,
            "PRECISION": "tf32" if tf32 else exact(self.x),
            "num_warps": warps_for(height, width),
            "num_stages": STAGES,
        }
        with torch.cuda.device_of(self.y):  # Triton launches on the current device
            if known is None:
                _product[(squares.numel(),)](*arguments, WRITE=out is not None, **options)
            else:
                addends = known.shape[2]
                options["KNOWN"] = triton.next_power_of_2(addends)
                _product_by_few[(squares.numel(),)](*arguments, known, addends, allowed, programs, **options)
        return squares


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
    WRITE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one sample's gradient, in one group; names of tuples are those of `Product`."""
    tile = tl.program_id(0)
    sample, tile = (tile // (groups * down * across)).to(tl.int64), tile % (groups * down * across)
    group, of_group = tile // (down * across), tile % (down * across)
    p = of_group // across * HEIGHT + tl.arange(0, HEIGHT)
    q = of_group % across * WIDTH + tl.arange(0, WIDTH)
    x_ptr += sample * x_stride[0]
    y_ptr += sample * y_stride[0]
    found = _tile(
        x_ptr,
        y_ptr,
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
        group,
        p,
        q,
        DEPTH,
        PRECISION,
    )
    if WRITE:
        places = kernel[0] * kernel[1] * kernel[2]
        inside = (p < p_each)[:, None] & (q // places < c_each)[None, :]
        row = (group * p_each + p)[:, None] * (c_each * places) + q[None, :]
        tl.store(out_ptr + sample * (groups * p_each * c_each * places) + row, found, mask=inside)
    else:
        tl.store(out_ptr + tl.program_id(0), tl.sum(tl.sum(found * found, 1), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _product_by_few(  # type: ignore[no-untyped-def]
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
    known_ptr,
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
    x_ptr += sample * x_stride[0]
    y_ptr += sample * y_stride[0]
    known, sure = known_of(known_ptr, sample, addends, allowed, KNOWN)
    total = tl.where(sure & (first == 0), known.to(tl.float32), 0.0)
    for tile in range(first, tl.where(sure, 0, groups * down * across), programs):
        group, of_group = tile // (down * across), tile % (down * across)
        p = of_group // across * HEIGHT + tl.arange(0, HEIGHT)
        q = of_group % across * WIDTH + tl.arange(0, WIDTH)
        found = _tile(
            x_ptr,
            y_ptr,
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
            group,
            p,
            q,
            DEPTH,
            PRECISION,
        )
        total += tl.sum(tl.sum(found * found, 1), 0)
    tl.store(out_ptr + tl.program_id(0), total)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    x_ptr,
    y_ptr,
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
    group,
    p,
    q,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows p and columns q of one sample's gradient, in one group."""
    places = kernel[0] * kernel[1] * kernel[2]
    c, place = q // places, q % places
    first_d = place // (kernel[1] * kernel[2]) * dilation[0] - padding[0]
    first_h = place // kernel[2] % kernel[1] * dilation[1] - padding[1]
    first_w = place % kernel[2] * dilation[2] - padding[2]
    x_ptr += group * c_each * x_stride[2]
    y_ptr += group * p_each * y_stride[2]
    found = tl.zeros((p.shape[0], q.shape[0]), dtype=tl.float32)
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
    return found
