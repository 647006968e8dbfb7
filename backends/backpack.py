"""BackPACK's first-order extensions (Dangel, Kunstner, Hennig 2020, https://backpack.pt), by extended modules.

`BatchGrad` for gradients, `BatchL2Grad` for norms, `Variance` for variances. Only modules that own parameters are
extended: first-order extensions need no others, so that functional activations and free-form `forward` methods work.
A layer must be called once, positionally, with the batch first.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backends.base import (
    Backend,
    Count,
    GradsFn,
    LossFn,
    Named,
    TensorFn,
    Unsupported,
    Wrong,
    describe,
    guarded,
    own_copy,
    owns_trained,
    refuse_wrong,
    register,
    trainable,
)
from backends.batch import Batch, call, detached, signature, size
from backends.module_calls import Shape, collect, pads_unlike_zeros, per_sample, quiet_hooks, watcher
from backends.probe import Hooked
from backends.running import library_call
from backends.verify import few_of, verify_rows


@register("backpack", requires={"backpack": "backpack-for-pytorch"})
@dataclass(frozen=True)
class BackPack(Backend):
    """`with backpack(BatchGrad()): loss.backward()`.

    Options:
        subsampling: Samples whose gradients a backward pass takes out; there are as many passes as it needs.
    """

    subsampling: Count | None = None

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the extended model with BatchGrad; see the contract."""
        from backpack.extensions import BatchGrad

        run = _extended(model, loss_fn, "grad_batch", rows=lambda found: found)
        look = _look(model, loss_fn) if self.subsampling else None

        def fn(inputs: Batch, targets: Tensor) -> Named:
            n = size(inputs)
            if look is None or self.subsampling is None or self.subsampling >= n:
                return run(inputs, targets, [BatchGrad()], [n])[0]
            look(inputs, targets)
            some = [list(range(i, min(i + self.subsampling, n))) for i in range(0, n, self.subsampling)]
            parts = run(inputs, targets, [BatchGrad(subsampling=s) for s in some], [len(s) for s in some])
            return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}

        return fn

    def norms(self, model: nn.Module, loss_fn: LossFn) -> TensorFn:
        """Build the extended model with BatchL2Grad: the squared norm of each parameter's gradient."""
        from backpack.extensions import BatchL2Grad

        rules = (_pads_with_zeros, _adds_up_groups)

        def norms(squares: Named) -> Tensor:
            return torch.stack(list(squares.values())).sum(0).sqrt()

        run = _extended(model, loss_fn, "batch_l2", lambda n, p: (n,), rules, norms)

        def fn(inputs: Batch, targets: Tensor) -> Tensor:
            (squares,) = run(inputs, targets, [BatchL2Grad()], [size(inputs)])
            return norms(squares)

        return fn

    def variance(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the extended model with Variance: mean square minus squared mean, which cancels where they are near."""
        from backpack.extensions import Variance

        run = _extended(model, loss_fn, "variance", lambda n, p: tuple(p.shape))
        look = _look(model, loss_fn)

        def fn(inputs: Batch, targets: Tensor) -> Named:
            look(inputs, targets)  # a variance does not show whose gradients it was made of
            (found,) = run(inputs, targets, [Variance()], [size(inputs)])
            # case "input: N = 1": one sample's variance is zero, the formula leaves rounding
            return found if size(inputs) > 1 else {name: torch.zeros_like(t) for name, t in found.items()}

        return fn


def _pads_with_zeros(layer: nn.Module) -> str | None:
    """Case "Conv2d(padding_mode='reflect')"."""
    return "BackPACK's rule would pad with zeros" if pads_unlike_zeros(layer) else None


def _pads_its_own_way(layer: nn.Module) -> str | None:
    """Case "Conv2d(padding='same')"."""
    same = getattr(layer, "padding", None) == "same" and layer.weight.requires_grad
    return "BackPACK's rule would not pad as the layer does; give the padding as numbers" if same else None


def _adds_up_groups(layer: nn.Module) -> str | None:
    """Case "Conv2d(groups=2)", in norms."""
    grouped = getattr(layer, "groups", 1) > 1 and layer.weight.requires_grad
    return "BackPACK's norms would be those of an ungrouped convolution; derive them from grads" if grouped else None


RULES: tuple[Wrong, ...] = (_pads_with_zeros, _pads_its_own_way)


def _look(model: nn.Module, loss_fn: LossFn) -> Callable[[Batch, Tensor], None]:
    """Return a function that verifies a few samples' gradients, once for each form of inputs."""
    from backpack.extensions import BatchGrad

    run = _extended(model, loss_fn, "grad_batch", rows=lambda found: found)
    seen = set()

    def look(inputs: Batch, targets: Tensor) -> None:
        if guarded() and (form := (signature(inputs), size(inputs) > 1)) not in seen:
            few = few_of(size(inputs))
            run(inputs, targets, [BatchGrad(subsampling=few)], [len(few)])
            seen.add(form)

    return look


Run = Callable[[Batch, Tensor, Sequence[Any], Sequence[int]], list[Named]]
"""(inputs, targets, extensions, how many samples each is for) -> their results: one forward, a backward for each."""


def _extended(
    model: nn.Module,
    loss_fn: LossFn,
    attribute: str,
    shape: Shape = per_sample,
    rules: Sequence[Wrong] = RULES,
    rows: Callable[[Named], Named | Tensor] | None = None,
) -> Run:
    """Return the function that runs an extended copy of the model, and takes its results off the parameters.

    Args:
        model: The caller's model.
        loss_fn: The loss.
        attribute: Where the extension leaves its result.
        shape: The result's.
        rules: What to refuse.
        rows: The results -> gradients or norms of samples, to be held against those of each alone.
    """
    from backpack import backpack, extend

    watching = watcher("BackPACK", model, _hooked)
    original, model = model, own_copy(model)
    parameters = trainable(model)
    for path, module in _trained(model):
        refuse_wrong(path, module, rules)
    counts: dict[str, int] = {}
    for path, module in _trained(model):
        extend(module)
        module.register_forward_hook(partial(_count, counts, describe(path, module)))

    def run(inputs: Batch, targets: Tensor, extensions: Sequence[Any], samples: Sequence[int]) -> list[Named]:
        results: list[Named] = []
        inputs, targets = detached(inputs), detached(targets)
        loss = torch.empty(0)
        counts.clear()
        with watching(inputs) as new:
            for extension, n in zip(extensions, samples, strict=True):
                more = len(results) + 1 < len(extensions)
                with quiet_hooks(), library_call(original, model, loss_fn, inputs, targets):
                    # an unknown layer is a warning there and a refusal here, in `collect`
                    warnings.filterwarnings("ignore", message="Extension saving to")
                    loss = loss if results else loss_fn(call(model, inputs), targets).sum()
                    if n < size(inputs):
                        _refuse_others(counts, size(inputs))
                    with backpack(extension, retain_graph=more):
                        torch.autograd.backward(loss, retain_graph=more)
                whole = attribute == "grad_batch" and n == size(inputs)
                found = collect("BackPACK", parameters, attribute, n, shape=shape, verify=new and whole)
                few = n == len(few_of(size(inputs)))
                if new and rows and len(extensions) == 1 and (few or n == size(inputs)):
                    verify_rows("BackPACK", rows(found), original, loss_fn, inputs, targets, only_few=few)
                results.append(found)
        return results

    return run


def _count(counts: dict[str, int], module: str, _: nn.Module, inputs: tuple[object, ...], output: object) -> None:
    """Note, in a forward hook, how many rows go into a module."""
    if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim():
        counts[module] = len(inputs[0])


def _refuse_others(counts: Mapping[str, int], samples: int) -> None:
    """Refuse modules that see other rows than the samples, before some are asked for: on CUDA that ends the process."""
    for module, count in counts.items():
        if guarded() and count != samples:
            raise Unsupported(
                f"{module}: {count} row(s) go in for {samples} samples; BackPACK takes row i to be sample i"
            )


def _trained(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules that own parameters which are trained, with their paths: those that are extended."""
    return [(path, module) for path, module in model.named_modules() if owns_trained(module)]


def _hooked(model: nn.Module) -> list[Hooked]:
    return [Hooked(module) for _, module in _trained(model)]
