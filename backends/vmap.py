"""`torch.func`: vmap over samples of grad of one sample's loss (https://docs.pytorch.org/docs/stable/func.html).

What it cannot do: data-dependent control flow, `.item()`, in-place updates of buffers by samples, nested tensors.
Convolution weight gradients become grouped convolutions, attention falls back to the math kernel: right, not fast.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

from backends.base import Backend, GradsFn, LossFn, Named, TensorFn, norms_of, own_copy, register, trainable
from backends.batch import Batch, apply, call
from backends.derived import chunks
from backends.execution import compiled
from backends.running import library_call


@register("vmap")
@dataclass(frozen=True)
class Vmap(Backend):
    """`vmap(grad(loss))` over the batch.

    Options:
        randomness: What dropout and the like do: refuse, one mask for all samples, or one for each.
    """

    own_modes: ClassVar[frozenset[str]] = frozenset({"compile"})  # the transform is what is compiled

    randomness: Literal["error", "same", "different"] = "error"

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build vmap(grad); see the contract."""
        return self._build(model, loss_fn, lambda grads: grads)

    def norms(self, model: nn.Module, loss_fn: LossFn) -> TensorFn:
        """Build vmap(‖grad‖): each sample's gradient is reduced inside the transform, a chunk at a time."""
        some, most = self._build(model, loss_fn, _norm), self.at_a_time(model)
        return lambda inputs, targets: torch.cat([some(*chunk) for chunk in chunks(inputs, targets, most)])

    def _build(
        self, model: nn.Module, loss_fn: LossFn, reduce: Callable[[Named], Any]
    ) -> Callable[[Batch, Tensor], Any]:
        original, model = model, own_copy(model)
        parameters = {name: p.detach() for name, p in trainable(model).items()}

        def loss(parameters: Named, buffers: Named, inputs: Batch, targets: Tensor) -> Tensor:
            inputs, targets = apply(lambda t: t[None], inputs), apply(lambda t: t[None], targets)
            outputs = call(lambda *a, **k: functional_call(model, (parameters, buffers), a, k), inputs)
            return loss_fn(outputs, targets).sum()

        def one(*sample: Any) -> Any:  # noqa: ANN401  a sample's arguments, and what is made of its gradient
            return reduce(grad(loss)(*sample))

        transform = vmap(one, (None, None, 0, 0), randomness=self.randomness)
        if self.compile:
            transform = compiled(transform)

        def fn(inputs: Batch, targets: Tensor) -> Any:  # noqa: ANN401
            buffers = {name: b.clone() for name, b in model.named_buffers()}
            with library_call(original, model, loss_fn, inputs, targets):
                result = transform(parameters, buffers, inputs, targets)
            return tree_map(torch.detach, result)  # the loss may hold parameters of its own

        return fn


def _norm(grads: Named) -> Tensor:
    """Return the norm of one sample's gradient over all parameters."""
    return norms_of({name: g[None] for name, g in grads.items()})[0]
