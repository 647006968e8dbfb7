"""Rules for convolutions of one to three dimensions and their transposes, by one bilinear form."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.ops.persample import Dense, Outer, PerSample
from backends.ops.rules import Pieces, rule

_WEIGHT_GRADIENT = (torch.nn.grad.conv1d_weight, torch.nn.grad.conv2d_weight, torch.nn.grad.conv3d_weight)


@dataclass
class Correlation(PerSample):
    """Gradients by w of ⟨y, conv(x, w)⟩: of a convolution for x = a, y = g, of a transposed one for x = g, y = a.

    A sample's gradient is the weight gradient of a convolution with as many groups: N samples are N times the groups
    of one. The weighted sum over samples is the ordinary weight gradient.

    Attributes:
        x: [N, B, C, *size], B images a sample.
        y: [N, B, P, *size].
        shape: Of w, [P, C / groups, *kernel].
        stride: In each dimension.
        padding: In each dimension.
        dilation: In each dimension.
        groups: Groups of channels.
    """

    x: Tensor
    y: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __post_init__(self) -> None:
        self.samples, self.like = len(self.y), self.y

    def rows(self, some: slice) -> Tensor:  # noqa: D102
        x, y = self.x[some], self.y[some]
        n, (p, *others) = len(x), self.shape
        side_by_side = (t.transpose(0, 1).flatten(1, 2) for t in (x, y))  # [B, N·channels, *size]
        return self._gradient(*side_by_side, (n * p, *others), n * self.groups).unflatten(0, (n, p))

    def compact(self) -> PerSample:  # noqa: D102
        held = (self.x.numel() + self.y.numel()) * self.like.element_size()
        return self if held <= self.bytes() else Dense(self.rows(slice(None)))

    def squares(self) -> Tensor:
        """Return ‖g_i‖² [N]; where images are small, as of a matrix that each patch went through."""
        positions = self.y.shape[1] * prod(self.y.shape[3:])
        if self.groups == 1 and 2 * positions < self.shape[0]:
            return self._patches().squares()
        return super().squares()

    def weighted(self, factors: Tensor) -> Tensor:  # noqa: D102
        y = self.y * factors.to(self.y.dtype).view(-1, *[1] * (self.y.dim() - 1))
        return self._gradient(self.x.flatten(0, 1), y.flatten(0, 1), self.shape, self.groups)

    def _gradient(self, x: Tensor, y: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
        function = _WEIGHT_GRADIENT[len(shape) - 3]
        return function(x, shape, y, self.stride, self.padding, self.dilation, groups)

    def _patches(self) -> Outer:
        """Return the same as gradients of a matrix [P, C·kernel]; one group only."""
        n, images, p, *size = self.y.shape
        x = F.pad(self.x.flatten(0, 1), [side for pad in reversed(self.padding) for side in (pad, pad)])
        batch, channel, *strides = x.stride()
        kernel = [s * d for s, d in zip(strides, self.dilation, strict=True)]
        steps = [s * d for s, d in zip(strides, self.stride, strict=True)]
        shape = (n * images, *size, x.shape[1], *self.shape[2:])
        patches = x.as_strided(shape, (batch, *steps, channel, *kernel)).reshape(n, images * prod(size), -1)
        return Outer(self.y.movedim(2, -1).reshape(n, -1, p), patches)


def images(x: Tensor, dimensions: int) -> Tensor:
    """Return [N, ..., C, *size] as [N, B, C, *size]."""
    return x.reshape(len(x), -1, *x.shape[-dimensions - 1 :])


def each(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Return an option as one number a dimension."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dimensions if len(numbers) == 1 else numbers


def summed(g: Tensor, dimensions: int) -> Dense:
    """Return the gradients of a bias [C] that was added to [N, ..., C, *size]."""
    g = images(g, dimensions)
    return Dense(g.sum((1, *range(3, g.dim()))))


@rule(F.conv1d, F.conv2d, F.conv3d)
def conv(
    g: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Pieces:
    """A convolution; padding="same" pads an odd number with one more zero at the end."""
    d = weight.dim() - 2
    dilation = each(dilation, d)
    if padding == "same":
        pads = [step * (width - 1) for step, width in zip(dilation, weight.shape[2:], strict=True)]
        input = F.pad(input, [side for pad in reversed(pads) for side in (0, pad % 2)])
        padding = tuple(pad // 2 for pad in pads)
    sizes = (each(stride, d), (0,) * d if isinstance(padding, str) else each(padding, d), dilation)
    weights = Correlation(images(input, d), images(g, d), tuple(weight.shape), *sizes, groups)
    return {"weight": weights, "bias": summed(g, d)}


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def conv_transpose(
    g: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Pieces:
    """The transpose of the convolution with the same options: ⟨g, convᵀ(a, w)⟩ = ⟨a, conv(g, w)⟩."""
    d = weight.dim() - 2
    sizes = (each(stride, d), each(padding, d), each(dilation, d))
    weights = Correlation(images(g, d), images(input, d), tuple(weight.shape), *sizes, groups)
    return {"weight": weights, "bias": summed(g, d)}
