"""Book-keeping by op."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backends.base import Backend, GradsFn, LossFn, Named, Positive, TensorFn, clip_factors, own_copy, register, trainable
from backends.batch import Batch
from backends.ops.persample import PerSample
from backends.ops.taps import per_sample
from backends.running import library_call
from collections.abc import Callable


@register("bookkeeping")
@dataclass(frozen=True)
class Bookkeeping(Backend):
    """Pairs."""

    reuse_buffers: bool = False

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        run, dtypes = _passes(model, loss_fn)

        def fn(inputs, targets):
            found = run(inputs, targets)
            return {name: found.pop(name).grads(lambda s, like: like.new_empty(s)).to(dtypes[name]) for name in dtypes}

        return fn

    def norms(self, model, loss_fn) -> TensorFn:
        run, dtypes = _passes(model, loss_fn)
        return lambda inputs, targets: _norms(run(inputs, targets)).to(next(iter(dtypes.values())))

    def clipped_sum(self, model, loss_fn, *, max_norm: Positive = 1.0):
        run, dtypes = _passes(model, loss_fn)

        def fn(inputs, targets):
            found = run(inputs, targets)
            factors = clip_factors(_norms(found), max_norm)
            return {name: found.pop(name).weighted(factors).to(dtypes[name]) for name in dtypes}

        return fn

    def variance(self, model, loss_fn):
        run, dtypes = _passes(model, loss_fn)
        return lambda i, t: {name: g.variance().to(dtypes[name]) for name, g in run(i, t).items()}

    def gram(self, model, loss_fn):
        run, dtypes = _passes(model, loss_fn)
        return lambda i, t: torch.stack([g.gram() for g in run(i, t).values()]).sum(0)


def _norms(found):
    return torch.stack([g.squares() for g in found.values()]).sum(0).sqrt()


def _passes(model, loss_fn):
    original, model = model, own_copy(model)
    run = per_sample(model, loss_fn)
    dtypes = {name: p.dtype for name, p in trainable(model).items()}

    def fn(inputs, targets):
        with library_call(original, model, loss_fn, inputs, targets):
            return run(inputs, targets)

    return fn, dtypes
