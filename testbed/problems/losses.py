"""Losses, one for each sample: (outputs [N, ...], targets [N, ...]) -> [N]."""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from testbed.problems.base import register_loss

Share = Annotated[float, Field(ge=0, le=1)]


@register_loss("nll")
def nll(outputs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of log-probabilities [N, C] and classes [N]."""
    return F.nll_loss(outputs, targets, reduction="none")


@register_loss("cross_entropy")
def cross_entropy(outputs: Tensor, targets: Tensor, *, label_smoothing: Share = 0.0) -> Tensor:
    """Cross-entropy of logits [N, C] and classes [N].

    Options:
        label_smoothing: Share of the target that is spread over all classes.
    """
    return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=label_smoothing)


@register_loss("mse")
def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over a sample's outputs [N, K] of the squared error; classes [N] are compared one-hot."""
    if not targets.is_floating_point():
        classes = torch.arange(outputs.shape[-1], device=targets.device)
        targets = (targets[..., None] == classes).to(outputs.dtype)  # F.one_hot looks at values, which vmap cannot
    return (outputs - targets).square().flatten(1).mean(1)
