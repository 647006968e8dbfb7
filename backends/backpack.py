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
    describe,
    guarded,
    own_copy,
    register,
    trainable,
)
from backends.batch import Batch, call, size
from backends.module_calls import collect, pads_unlike_zeros, quiet_hooks, watcher
from backends.probe import Hooked
from backends.running import library_call


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
                return collect("BackPACK", parameters, "grad_batch", size(inputs), verify=new)

        return fn


def _hooked(model: nn.Module) -> list[Hooked]:
    return [Hooked(m) for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]


def _refuse_options(model: nn.Module) -> None:
    """Refuse the layer options that BackPACK does not look at."""
    for path, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            for wrong in (_pads_with_zeros, _pads_its_own_way):
                if guarded() and (reason := wrong(module)):
                    raise Unsupported(f"{describe(path, module, options=True)}: {reason}")


def _pads_with_zeros(layer: nn.Module) -> str | None:
    """Case "Conv2d(padding_mode='reflect')"."""
    return "BackPACK's rule would pad with zeros" if pads_unlike_zeros(layer) else None


def _pads_its_own_way(layer: nn.Module) -> str | None:
    """Case "Conv2d(padding='same')"."""
    same = getattr(layer, "padding", None) == "same" and layer.weight.requires_grad
    return "BackPACK's rule would not pad as the layer does; give the padding as numbers" if same else None
