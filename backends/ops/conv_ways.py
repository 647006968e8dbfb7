"""Ways to the per-sample weight gradients of a convolution, of which the fastest is chosen by measuring."""

from itertools import product
from math import prod
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from backends.ops.outer import outer
from backends.ops.persample import at_a_time

if TYPE_CHECKING:
    from backends.ops.conv_kernel import Product
    from backends.ops.correlation import Correlation


def grouped(of: "Correlation") -> Tensor:
    """A sample's gradient is that of one more group: N samples are a convolution of N·groups groups."""
    n, (p, *others) = of.samples, of.shape
    x, y = (t.transpose(0, 1).flatten(1, 2) for t in (of.x, of.y))  # [B, N·channels, *size]
    return of.gradient(x, y, (n * p, *others), n * of.groups).view(n, p, *others)


def by_patches(of: "Correlation") -> Tensor:
    """Products of matrices of patches, for as many samples at a time as stay in cache."""
    patches = prod(of.y.shape[3:]) * of.y.shape[1] * prod(of.shape[1:])  # numbers a sample
    out = of.y.new_empty(of.samples, of.shape[0], prod(of.shape[1:]))
    for some in at_a_time(of.samples, patches * of.like.element_size(), of.like):
        pair = of.only(some).patches()
        outer(pair.left, pair.right, out=out[some])
    return out.view(-1, *of.shape)


def by_places(of: "Correlation") -> Tensor:
    """One product of matrices for each place in the kernel, of images that are there: no patches. Stride 1 only.

    Rows of pixels go on without a gap once y is as wide as the padded x; then all of an image, shifted, is one matrix.
    """
    (p, c, *kernel), out_size = of.shape, of.y.shape[3:]
    size = [width + 2 * pad for width, pad in zip(of.x.shape[3:], of.padding, strict=True)]
    pixel = [prod(size[d + 1 :]) for d in range(len(size))]
    length = 1 + sum((width - 1) * step for width, step in zip(out_size, pixel, strict=True))
    wider = [0, *(whole - part for whole, part in zip(size[1:], out_size[1:], strict=True))]
    rows = of.y.new_empty(of.samples, p, c, prod(kernel))
    for some in at_a_time(of.samples, of.like.element_size() * max((c + p) * prod(size), rows[0].numel()), of.like):
        x = F.pad(of.x[some, 0], [side for pad in reversed(of.padding) for side in (pad, pad)]).flatten(2)
        y = F.pad(of.y[some, 0], [side for more in reversed(wider) for side in (0, more)]).flatten(2)[..., :length]
        places = of.y.new_empty(prod(kernel), len(x), p, c)
        for place, index in zip(places, product(*map(range, kernel)), strict=True):
            start = sum(i * apart * step for i, apart, step in zip(index, of.dilation, pixel, strict=True))
            outer(y.mT, x[..., start : start + length].mT, out=place)
        rows[some] = places.movedim(0, -1)
    return rows.view(-1, *of.shape)


def product_of(of: "Correlation") -> "Product":
    """Return what a Triton kernel computes."""
    from backends.ops.conv_kernel import Product  # triton need not be installed

    return Product(of.x, of.y, of.shape[2:], of.stride, of.padding, of.dilation, of.groups)
