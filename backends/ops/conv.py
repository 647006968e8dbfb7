"""Rules for convolutions of one to three dimensions and their transposes."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from backends.ops.correlation import Correlation
from backends.ops.persample import Dense
from backends.ops.rules import Pieces, rule


def images(x: Tensor, dimensions: int) -> Tensor:
    """Return [N, ..., C, *size] as [N, B, C, *size]."""
    return x.reshape(x.shape[0], -1, *x.shape[-dimensions - 1 :])


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
    return {"weight": weights, **({} if bias is None else {"bias": summed(g, d)})}


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
    return {"weight": weights, **({} if bias is None else {"bias": summed(g, d)})}
