"""NNGeometry (George 2021, https://github.com/tfjgeorge/nngeometry): Jacobian and Gram matrix by hooks, layer by layer.

The Gram matrix of a Linear is the product of those of its inputs and output gradients; other layers' gradients are
built for it and freed. Layers must own their weights, be called once, and lie between a floating-point input and the
loss: the library sees what a backward pass to its first tensor meets, here a zero that is added to all such inputs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backends.base import (
    Backend,
    GradsFn,
    LossFn,
    Named,
    TensorFn,
    Unsupported,
    describe,
    guarded,
    own_copy,
    owns_trained,
    refuse_wrong,
    register,
    trainable,
)
from backends.batch import Batch, call, detached, size, tensors
from backends.module_calls import collect, pads_unlike_zeros, watcher
from backends.probe import Hooked
from backends.running import batch_gradient, library_call
from backends.verify import verify_gram, verify_rows


@register("nngeometry", requires={"nngeometry": "nngeometry"})
@dataclass(frozen=True)
class NNGeometry(Backend):
    """`PFMapDense` and `FMatDense` of the losses, with a `TorchHooksJacobianBackend`."""

    narrow: ClassVar[bool] = True  # it may refuse everyday models: it knows no sequences, groups or embeddings

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the model's copy; see the contract."""
        from nngeometry.object import PFMapDense

        original, model = model, own_copy(model)
        parameters = trainable(model)
        run = _runner(PFMapDense, original, model, loss_fn)

        def fn(inputs: Batch, targets: Tensor) -> Named:
            with run(inputs, targets) as (jacobian, total):
                for path, blocks in jacobian.iter_by_module():
                    for name, block in zip(("weight", "bias"), blocks, strict=False):
                        if (parameter := parameters.get(f"{path}.{name}".lstrip("."))) is not None:
                            parameter.jacobian = block[0].reshape(-1, *parameter.shape)  # type: ignore[attr-defined]  # as libraries do, for collect
                found = collect(
                    "NNGeometry", parameters, "jacobian", size(inputs), verify=bool(total), totals=total or None
                )
                if total:
                    verify_rows("NNGeometry", found, original, loss_fn, inputs, targets)
                return found

        return fn

    def gram(self, model: nn.Module, loss_fn: LossFn) -> TensorFn:
        """Build the model's copy; see the contract."""
        from nngeometry.object import FMatDense

        original, model = model, own_copy(model)
        if guarded():
            _refuse_part_of_a_layer(model)
        run = _runner(FMatDense, original, model, loss_fn)

        def fn(inputs: Batch, targets: Tensor) -> Tensor:
            with run(inputs, targets) as (matrix, total):
                gram: Tensor = matrix.to_torch()[0, :, 0, :]
                if total:
                    verify_rows("NNGeometry", gram.diagonal().sqrt(), original, loss_fn, inputs, targets)
                    verify_gram("NNGeometry", gram, total)
                return gram

        return fn


def _runner(what: Any, original: nn.Module, model: nn.Module, loss_fn: LossFn) -> Callable[[Batch, Tensor], Any]:  # noqa: ANN401
    """Return the context in which `what` is computed: its value, and the batch gradient where there is one to check."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection

    watching = watcher("NNGeometry", original, _hooked)
    plain = own_copy(original)
    layers = LayerCollection()
    for path, module in model.named_modules():
        if owns_trained(module):
            _refuse_options(path, module)
            try:
                layers.add_layer_from_model(model, module)
            except NotImplementedError:
                raise Unsupported(f"{describe(path, module)}: NNGeometry has no rule for such a layer") from None
    usual, exact = torch.get_default_dtype(), next(iter(trainable(model).values())).dtype

    @contextmanager
    def run(inputs: Batch, targets: Tensor) -> Iterator[tuple[Any, Named]]:
        def losses(zero: Tensor, *rows: Tensor) -> Tensor:
            *found, labels = rows
            found = [t + zero.view(-1, *[1] * (t.dim() - 1)) if t.is_floating_point() else t for t in found]
            batch = dict(zip(inputs, found, strict=True)) if isinstance(inputs, dict) else tuple(found)
            with _default_dtype(usual):
                return loss_fn(call(model, found[0] if isinstance(inputs, Tensor) else batch), labels)

        inputs, targets = detached(inputs), detached(targets)
        zero = torch.zeros(size(inputs), dtype=exact, device=targets.device)
        with watching(inputs) as new:
            generator = TorchHooksJacobianBackend(model=model, function=losses, layer_collection=layers)
            # some of its buffers are in the default dtype, whatever the model's is
            with (
                library_call(plain, model, loss_fn, inputs, targets),
                _default_dtype(torch.promote_types(exact, usual)),
            ):
                try:
                    result = what(generator=generator, examples=(zero, *tensors(inputs), targets))
                finally:
                    for handle in generator.handles:
                        handle.remove()
            yield result, batch_gradient(plain, loss_fn, inputs, targets) if new else {}

    return run


def _hooked(model: nn.Module) -> list[Hooked]:
    return [Hooked(m) for m in model.modules() if owns_trained(m)]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _refuse_options(path: str, layer: nn.Module) -> None:
    """Refuse the layers that only look as if NNGeometry had a rule, and the options that its rules do not look at."""
    own = {name for name, _ in layer.named_parameters(recurse=False)}
    if not type(layer).__module__.startswith("torch.nn.") or own - {"weight", "bias"}:  # it goes by the type's name
        raise Unsupported(f"{describe(path, layer)}: NNGeometry has no rule for such a layer")
    refuse_wrong(path, layer, (_pads_with_zeros, _ignores_groups, _ignores_eps))


def _pads_with_zeros(layer: nn.Module) -> str | None:
    """Case "Conv2d(padding_mode='reflect')"."""
    return "NNGeometry's rule would pad with zeros" if pads_unlike_zeros(layer) else None


def _ignores_groups(layer: nn.Module) -> str | None:
    """Case "Conv2d(groups=2)"."""
    return "NNGeometry's rule would take all channels for one group" if getattr(layer, "groups", 1) != 1 else None


def _ignores_eps(layer: nn.Module) -> str | None:
    """Case "BatchNorm2d(eps=0.1)"."""
    other = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.eps != nn.BatchNorm1d(1).eps
    return "NNGeometry's rule would normalise with the default eps" if other else None


def _refuse_part_of_a_layer(model: nn.Module) -> None:
    """Case "GroupNorm(bias=False)": the Gram matrix is that of all of a layer's parameters, whether there or not."""
    for path, layer in model.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        missing = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm) and len(own) == 1
        if any(p.requires_grad for p in own.values()) and (missing or not all(p.requires_grad for p in own.values())):
            raise Unsupported(
                f"{describe(path, layer)} has its weight or bias frozen or left out; NNGeometry's Gram "
                "matrix would be that of both"
            )
