"""Opacus' GradSampleModule (Yousefpour et al. 2021, https://opacus.ai): per-sample gradients by module hooks.

Modes: `hooks` (a hand-written rule a layer, functorch for the rest), `functorch` (vmap a layer), `ew` (PyTorch's
ExpandedWeights). They are right where the library sees every use of a parameter; elsewhere this file refuses.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from backends.base import (
    Backend,
    GradsFn,
    LossFn,
    Named,
    Unsupported,
    describe,
    library_call,
    own_copy,
    register,
    trainable,
)
from backends.batch import Batch, call
from backends.module_calls import Hooked, collect, quiet_hooks, watcher


@register("opacus", requires={"opacus": "opacus"})
@dataclass(frozen=True)
class Opacus(Backend):
    """`GradSampleModule` as Opacus wraps models.

    Options:
        mode: How Opacus computes a layer's per-sample gradient.
    """

    mode: Literal["hooks", "functorch", "ew"] = "hooks"

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the wrapped model; see the contract."""
        from opacus.grad_sample import wrap_model

        watching = watcher("Opacus", model, self._hooked, outside=self.mode == "ew", repeats=True)
        original, model = model, own_copy(model)
        parameters = trainable(model)
        self._refuse_options(model)
        hooked = list(self._hooked(model))
        wrapped = wrap_model(model, grad_sample_mode=self.mode, loss_reduction="sum")
        if self.mode != "ew":
            _capture_in_eval(hooked)

        def fn(inputs: Batch, targets: Tensor) -> Named:
            with watching(inputs) as new:
                wrapped.zero_grad(set_to_none=True)
                with quiet_hooks(), library_call(original, model, loss_fn, inputs, targets):
                    torch.autograd.backward(loss_fn(call(wrapped, inputs), targets).sum())
                return collect("Opacus", parameters, "grad_sample", verify=new)

        return fn

    def _refuse_options(self, model: nn.Module) -> None:
        """Refuse the layer options that Opacus does not look at, or does not support."""
        for path, module in model.named_modules():
            if not any(p.requires_grad for p in module.parameters(recurse=False)) or self.mode == "ew":
                continue
            if any(True for _ in module.buffers()):
                raise Unsupported(f"{describe(path, module)} has parameters and buffers, which Opacus does not support")
            padding = getattr(module, "padding_mode", "zeros")
            if padding != "zeros" and self.mode == "hooks":
                where = f"`{path or 'model'}` ({type(module).__name__}(padding_mode='{padding}'))"
                raise Unsupported(f"{where}: Opacus' rule would pad with zeros; mode 'functorch' pads right")

    def _hooked(self, model: nn.Module) -> Iterator[Hooked]:
        """Yield the modules that Opacus hooks, as its `iterate_submodules` does, and what each rule covers."""
        from opacus.grad_sample import GradSampleModule

        def walk(module: nn.Module) -> Iterator[Hooked]:
            owner = any(p.requires_grad for p in module.parameters(recurse=False))
            general = self.mode != "ew" and owner and type(module) not in GradSampleModule.GRAD_SAMPLERS
            if owner:
                yield Hooked(module, deep=general, single=general or self.mode == "functorch")
            if not general:
                for child in module.children():
                    yield from walk(child)

        return walk(model)


def _capture_in_eval(hooked: list[Hooked]) -> None:
    """Make Opacus capture activations of modules in eval mode too: its hook only looks at `module.training`.

    The flag is up just while Opacus' forward hook runs, after the module's forward has run in its own mode.
    """
    for h in hooked:
        if not h.module.training:
            h.module.register_forward_hook(lambda module, *_: setattr(module, "training", True), prepend=True)
            h.module.register_forward_hook(lambda module, *_: setattr(module, "training", False))
