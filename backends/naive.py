"""The loop: one forward and one backward a sample. Slow, and right by definition; every other backend is held to it.

As in PyTorch's tutorial "Per-sample-gradients" (https://docs.pytorch.org/tutorials/intermediate/per_sample_grads.html).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backends.base import Backend, GradsFn, LossFn, Named, own_copy, register, trainable
from backends.batch import Batch, call, detached, size, take
from backends.running import kept_buffers, kept_random_state


@register("naive")
@dataclass(frozen=True)
class Naive(Backend):
    """Ordinary autograd on batches of one; supports whatever autograd does.

    What is derived from the gradients is accumulated sample by sample: the memory is that of one sample.
    """

    reference: ClassVar[bool] = True

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the loop over samples; see the contract."""
        model = own_copy(model)
        parameters = trainable(model)

        def one(inputs: Batch, targets: Tensor) -> list[Tensor]:
            model.zero_grad(set_to_none=True)
            with torch.enable_grad(), kept_buffers(model):
                torch.autograd.backward(loss_fn(call(model, inputs), targets).sum())
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
            return [g.to_dense() if g.is_sparse else g for g in grads]

        def fn(inputs: Batch, targets: Tensor) -> Named:
            inputs, targets = detached(inputs), detached(targets)
            samples = [slice(i, i + 1) for i in range(size(inputs))]
            with kept_random_state(model):
                rows = [one(take(inputs, i), take(targets, i)) for i in samples]
            return {name: torch.stack(column) for name, column in zip(parameters, zip(*rows, strict=True), strict=True)}

        return fn

    def at_a_time(self, model: nn.Module) -> int:
        """Return one: a chunk of samples would be the same loop with more memory."""
        return 1
