"""The loop: one forward and one backward a sample. Slow, and right by definition; every other backend is held to it.

As in PyTorch's tutorial "Per-sample-gradients" (https://docs.pytorch.org/tutorials/intermediate/per_sample_grads.html).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backends.base import Backend, GradsFn, LossFn, Named, kept_buffers, own_copy, register, trainable
from backends.batch import Batch, call, size, take


@register("naive")
@dataclass(frozen=True)
class Naive(Backend):
    """Ordinary autograd on batches of one; supports whatever autograd does."""

    reference: ClassVar[bool] = True

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the loop over samples; see the contract."""
        model = own_copy(model)
        parameters = trainable(model)

        def one(inputs: Batch, targets: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad(), kept_buffers(model):
                loss = loss_fn(call(model, inputs), targets).sum()
                return torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)

        def fn(inputs: Batch, targets: Tensor) -> Named:
            samples = [slice(i, i + 1) for i in range(size(inputs))]
            rows = [one(take(inputs, i), take(targets, i)) for i in samples]
            return {name: torch.stack(column) for name, column in zip(parameters, zip(*rows, strict=True), strict=True)}

        return fn
