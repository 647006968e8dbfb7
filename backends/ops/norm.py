"""Rules for normalisation layers: y = x̂ · w + b, x̂ the op's output without weight and bias."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from backends.ops.conv import summed
from backends.ops.persample import Dense
from backends.ops.rules import Pieces, rule


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


@rule(F.instance_norm)
def instance_norm(
    g: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Pieces:
    """Mean 0 and variance 1 over each image of each channel; or by running statistics."""
    images = input.flatten(0, 1)
    if use_input_stats:
        return _channels(g, F.instance_norm(images, eps=eps).view_as(g))
    return _channels(g, F.batch_norm(images, running_mean, running_var, eps=eps).view_as(g))


@rule(F.batch_norm, covers=lambda arguments: not arguments["training"])
def batch_norm(
    g: Tensor,
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Pieces:
    """Normalisation by running statistics; by those of the batch no sample has a gradient of its own."""
    return _channels(g, F.batch_norm(input.flatten(0, 1), running_mean, running_var, eps=eps).view_as(g))
