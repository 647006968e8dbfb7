"""BackPACK's BatchGrad (Dangel, Kunstner, Hennig 2020, https://backpack.pt): per-sample gradients by extended modules.

Only modules that own parameters are extended: first-order extensions need no others, so that functional activations
and free-form `forward` methods work. A layer must be called once, positionally, with the batch first.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backends.base import (
    Backend,
    GradsFn,
    LossFn,
    Named,
    Unsupported,
    library_call,
    own_copy,
    register,
    trainable,
)
from backends.batch import Batch, call
from backends.module_calls import Hooked, collect, quiet_hooks, watcher


@register("backpack", requires={"backpack": "backpack-for-pytorch"})
@dataclass(frozen=True)
class BackPack(Backend):
    """`with backpack(BatchGrad()): loss.backward()`."""

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the extended model; see the contract."""
        from backpack import backpack, extend
        from backpack.extensions import BatchGrad

        watching = watcher("BackPACK", model, _hooked)
        original, model = model, own_copy(model)
        parameters = trainable(model)
        _refuse_options(model)
        for h in _hooked(model):
            extend(h.module)

        def fn(inputs: Batch, targets: Tensor) -> Named:
            with watching(inputs) as new:
                with quiet_hooks(), library_call(original, model, loss_fn, inputs, targets), backpack(BatchGrad()):
                    # an unknown layer is a warning there and a refusal here, in `collect`
                    warnings.filterwarnings("ignore", message="Extension saving to grad_batch")
                    torch.autograd.backward(loss_fn(call(model, inputs), targets).sum())
                return collect("BackPACK", parameters, "grad_batch", verify=new)

        return fn


def _hooked(model: nn.Module) -> list[Hooked]:
    return [Hooked(m) for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]


def _refuse_options(model: nn.Module) -> None:
    """Refuse the layer options that BackPACK does not look at."""
    for path, module in model.named_modules():
        padding = getattr(module, "padding_mode", "zeros")
        if padding != "zeros" and any(p.requires_grad for p in module.parameters(recurse=False)):
            where = f"`{path or 'model'}` ({type(module).__name__}(padding_mode='{padding}'))"
            raise Unsupported(f"{where}: BackPACK's rule would pad with zeros")
