"""PyTorch's ExpandedWeights, `torch.nn.utils`' own per-sample call: functions of parameters, not modules, are watched.

A parameter is replaced by a tensor whose few known functions (linear, convolutions, embedding, norms, recurrent ones)
leave per-sample gradients behind; any other function of it raises. Weights may be shared and used anywhere. It is
private to PyTorch (`_per_sample_grad`), and what Opacus' mode `ew` wraps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backends.base import Backend, GradsFn, LossFn, Named, own_copy, owns_trained, refuse_wrong, register, trainable
from backends.batch import Batch, call, detached, size
from backends.expanded import expanded, normalises_anew, trains_padding
from backends.module_calls import collect, watcher
from backends.running import batch_gradient, kept_attributes, library_call
from backends.verify import verify_rows


@register("expanded_weights")
@dataclass(frozen=True)
class ExpandedWeights(Backend):
    """`call_for_per_sample_grads(model, loss_reduction="sum")`."""

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the model's copy; see the contract."""
        from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

        watching = watcher("ExpandedWeights", model, functions=expanded, repeats=lambda module: True)
        plain, model = own_copy(model), own_copy(model)
        parameters = trainable(model)
        for path, module in model.named_modules():
            if owns_trained(module):
                refuse_wrong(path, module, (trains_padding, normalises_anew))

        def fn(inputs: Batch, targets: Tensor) -> Named:
            inputs, targets = detached(inputs), detached(targets)
            for p in parameters.values():
                vars(p).pop("grad_sample", None)  # of a call that failed half-way
            with watching(inputs) as new, kept_attributes(model):
                with library_call(plain, model, loss_fn, inputs, targets):
                    per_sample = call_for_per_sample_grads(model, batch_size=size(inputs), loss_reduction="sum")
                    torch.autograd.backward(loss_fn(call(per_sample, inputs), targets).sum())
                totals = batch_gradient(plain, loss_fn, inputs, targets) if new else None
                found = collect("ExpandedWeights", parameters, "grad_sample", size(inputs), verify=new, totals=totals)
                if new:
                    verify_rows("ExpandedWeights", found, plain, loss_fn, inputs, targets)
                return found

        return fn
