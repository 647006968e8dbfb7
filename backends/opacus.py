"""Opacus' GradSampleModule (Yousefpour et al. 2021, https://opacus.ai): per-sample gradients by module hooks.

Modes: `hooks` (a hand-written rule a layer, functorch for the rest), `functorch` (vmap a layer), `ew` (PyTorch's
ExpandedWeights). They are right where the library sees every use of a parameter; elsewhere this file refuses.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from backends.base import Backend, GradsFn, LossFn, Named, Wrong, own_copy, register, trainable
from backends.batch import Batch, call, detached, size
from backends.expanded import expanded, normalises_anew, trains_padding
from backends.module_calls import collect, quiet_hooks, watcher
from backends.opacus_hooks import HOOK_RULES, hooked_by_opacus, refuse_options, wrapped_by_opacus
from backends.probe import Hooked
from backends.running import batch_gradient, kept_attributes, library_call
from backends.verify import verify_rows

RULES: dict[str, tuple[Wrong, ...]] = {"hooks": HOOK_RULES, "functorch": (), "ew": (trains_padding, normalises_anew)}


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
        ew = self.mode == "ew"

        def hooked(model: nn.Module) -> list[Hooked]:
            return [] if ew else hooked_by_opacus(model, functorch=self.mode == "functorch")

        watching = watcher("Opacus", model, hooked, functions=expanded if ew else None, repeats=lambda module: True)
        plain, model = own_copy(model), own_copy(model)
        parameters = trainable(model)
        refuse_options(model, RULES[self.mode], buffers=not ew, strides=self.mode == "hooks")
        wrapped = wrapped_by_opacus(model, hooked(model), grad_sample_mode=self.mode)

        def fn(inputs: Batch, targets: Tensor) -> Named:
            inputs, targets = detached(inputs), detached(targets)
            with watching(inputs) as new, kept_attributes(wrapped) if ew else nullcontext():
                wrapped.zero_grad(set_to_none=True)
                with quiet_hooks(), library_call(plain, model, loss_fn, inputs, targets):
                    torch.autograd.backward(loss_fn(call(wrapped, inputs), targets).sum())
                totals = batch_gradient(plain, loss_fn, inputs, targets) if ew and new else None
                found = collect("Opacus", parameters, "grad_sample", size(inputs), verify=new, totals=totals)
                if new:
                    verify_rows("Opacus", found, plain, loss_fn, inputs, targets)
                return found

        return fn
