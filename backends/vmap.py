"""`torch.func`: vmap over samples of grad of one sample's loss (https://docs.pytorch.org/docs/stable/func.html).

What it cannot do: data-dependent control flow, `.item()`, in-place updates of buffers by samples, nested tensors.
Convolution weight gradients become grouped convolutions, attention falls back to the math kernel: right, not fast.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from backends.base import Backend, GradsFn, LossFn, Named, own_copy, register, trainable
from backends.batch import Batch, apply, call
from backends.running import library_call


@register("vmap")
@dataclass(frozen=True)
class Vmap(Backend):
    """`vmap(grad(loss))` over the batch.

    Options:
        chunk_size: Samples at a time; less memory, more launches. None: all at once.
        randomness: What dropout and the like do: refuse, one mask for all samples, or one for each.
    """

    chunk_size: Annotated[int, Field(gt=0)] | None = None
    randomness: Literal["error", "same", "different"] = "error"

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build vmap(grad); see the contract."""
        original, model = model, own_copy(model)
        parameters = {name: p.detach() for name, p in trainable(model).items()}

        def loss(parameters: Named, buffers: Named, inputs: Batch, targets: Tensor) -> Tensor:
            inputs, targets = apply(lambda t: t[None], inputs), apply(lambda t: t[None], targets)
            outputs = call(lambda *a, **k: functional_call(model, (parameters, buffers), a, k), inputs)
            return loss_fn(outputs, targets).sum()

        transform = vmap(grad(loss), (None, None, 0, 0), chunk_size=self.chunk_size, randomness=self.randomness)

        def fn(inputs: Batch, targets: Tensor) -> Named:
            buffers = {name: b.clone() for name, b in model.named_buffers()}
            with library_call(original, model, loss_fn, inputs, targets):
                grads: Named = transform(parameters, buffers, inputs, targets)
            return {name: g.detach() for name, g in grads.items()}  # the loss may hold parameters of its own

        return fn
