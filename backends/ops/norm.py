"""Rules for normalisation layers: y = x̂ · w + b, x̂ the op's output without weight and bias."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from backends.ops.conv import summed
from backends.ops.persample import Dense
from backends.ops.taps import Pieces, rule


def _last_axes(g: Tensor, normalised: Tensor, axes: int) -> Pieces:
    """Return the gradients of a weight and bias over the last axes."""
    shape = g.shape[g.dim() - axes :]
    both = {"weight": g * normalised, "bias": g}
    return {role: Dense(t.reshape(len(g), -1, *shape).sum(1)) for role, t in both.items()}


def _channels(g: Tensor, normalised: Tensor) -> Pieces:
    """Return the gradients of a weight and bias over the channels of [N, 1, C, *size]."""
    return {"weight": summed(g * normalised, g.dim() - 3), "bias": summed(g, g.dim() - 3)}


@rule(F.layer_norm)
def layer_norm(
    g: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Pieces:
    """Mean 0 and variance 1 over the last axes."""
    return _last_axes(g, F.layer_norm(input, normalized_shape, eps=eps), len(normalized_shape))


@rule(F.rms_norm)
def rms_norm(
    g: Tensor, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Pieces:
    """Mean square 1 over the last axes."""
    return _last_axes(g, F.rms_norm(input, normalized_shape, eps=eps), len(normalized_shape))


@rule(F.group_norm)
def group_norm(
    g: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Pieces:
    """Mean 0 and variance 1 over groups of channels."""
    normalised = F.group_norm(input.flatten(0, 1), num_groups, eps=eps)
    return _channels(g, normalised.view_as(g))
