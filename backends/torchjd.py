"""TorchJD (Quinton, Rey 2024, arXiv 2406.16232, https://torchjd.org): the Gram matrix without the Jacobian.

`autogram` runs each module that owns parameters anew, under vmap, while one backward pass goes by, and adds up the
modules' Gram matrices; the norms are its diagonal, and with weights drawn from it a second backward pass gives a
clipped sum. `autojac` gives the gradients themselves: ordinary autograd, vectorised over the losses.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from backends.base import (
    Backend,
    GradsFn,
    LossFn,
    Named,
    Positive,
    TensorFn,
    Unsupported,
    check_max_norm,
    clip_factors,
    own_copy,
    owns_trained,
    register,
    trainable,
)
from backends.batch import Batch, call, detached
from backends.module_calls import watcher
from backends.probe import Hooked
from backends.running import batch_gradient, culprit, first_sentence, library_call
from backends.verify import refuse_nonlinear, verify_gram, verify_rows

T = TypeVar("T")


@register("torchjd", requires={"torchjd": "torchjd"})
@dataclass(frozen=True)
class TorchJD(Backend):
    """`autogram.Engine(model, batch_dim=0).compute_gramian(losses)`, and `autojac.jac(losses, parameters)`.

    Options:
        parallel_chunk_size: Losses that `jac` differentiates at a time; 1 does without vmap. None: all at once.
    """

    parallel_chunk_size: Annotated[int, Field(gt=0)] | None = None

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the model's copy; see the contract."""
        from torchjd.autojac import jac

        original, model = model, own_copy(model)
        parameters = trainable(model)

        def fn(inputs: Batch, targets: Tensor) -> Named:
            inputs, targets = detached(inputs), detached(targets)
            with library_call(original, model, loss_fn, inputs, targets):
                losses = loss_fn(call(model, inputs), targets)
                rows = jac(losses, list(parameters.values()), parallel_chunk_size=self.parallel_chunk_size)
            return {name: row.detach() for name, row in zip(parameters, rows, strict=True)}

        return fn

    def gram(self, model: nn.Module, loss_fn: LossFn) -> TensorFn:
        """Build the model with the engine's hooks; see the contract."""
        return self._with_gram(model, loss_fn, lambda gram, losses, parameters: gram)

    def norms(self, model: nn.Module, loss_fn: LossFn) -> TensorFn:
        """Build as for `gram`, whose diagonal holds the squares."""
        return self._with_gram(model, loss_fn, lambda gram, losses, parameters: gram.diagonal().sqrt())

    def clipped_sum(self, model: nn.Module, loss_fn: LossFn, *, max_norm: Positive = 1.0) -> GradsFn:
        """Build as for `gram`; the losses, weighted by the clip factors, are sent back once more."""
        check_max_norm(max_norm)

        def weighted(gram: Tensor, losses: Tensor, parameters: Named) -> Named:
            factors = clip_factors(gram.diagonal().sqrt(), max_norm).to(losses.dtype)
            rows = torch.autograd.grad(losses, list(parameters.values()), factors, materialize_grads=True)
            return {name: row.to_dense() for name, row in zip(parameters, rows, strict=True)}

        return self._with_gram(model, loss_fn, weighted, weights=True)

    def _with_gram(
        self, model: nn.Module, loss_fn: LossFn, then: Callable[[Tensor, Tensor, Named], T], weights: bool = False
    ) -> Callable[[Batch, Tensor], T]:
        """Build the function that returns what `then` makes of Gram matrix [N, N], losses [N] and parameters."""
        from torchjd.autogram import Engine

        watching = watcher("TorchJD", model, _hooked, repeats=lambda module: True, shares=False)
        plain, model = own_copy(model), own_copy(model)
        parameters: Named = dict(trainable(model))
        hooked = [h.module for h in _hooked(model)]
        try:
            engine = Engine(*hooked, batch_dim=0)
        except ValueError as error:
            raise Unsupported(f"{culprit(error, model)}: {first_sentence(error)}") from error

        def fn(inputs: Batch, targets: Tensor) -> T:
            nonlocal engine
            inputs, targets = detached(inputs), detached(targets)
            with watching(inputs) as new:
                with library_call(plain, model, loss_fn, inputs, targets):
                    try:
                        losses = loss_fn(call(model, inputs), targets)
                    except BaseException:
                        engine = Engine(*hooked, batch_dim=0)  # the old one would wait for this pass's backward
                        raise
                    gram = engine.compute_gramian(losses)
                    result = then(gram, losses, parameters)
                if new:
                    if weights:
                        refuse_nonlinear("TorchJD", plain, loss_fn, inputs, targets)
                    verify_rows("TorchJD", gram.diagonal().sqrt(), plain, loss_fn, inputs, targets)
                    verify_gram("TorchJD", gram, batch_gradient(plain, loss_fn, inputs, targets))
            return result

        return fn


def _hooked(model: nn.Module) -> list[Hooked]:
    """Return the modules for the engine: those that own trainable parameters, and then not their children.

    Given the model, it would find the same by itself, but hook a module that has two parents twice.
    """

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        if owns_trained(module):
            yield module
        else:
            for child in module.children():
                yield from walk(child)

    return [Hooked(module, deep=True, reruns=True, several=True) for module in dict.fromkeys(walk(model))]
