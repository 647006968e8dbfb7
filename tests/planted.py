"""Backends that are wrong on purpose; every one of them must fail a run. Given to the command line with `--plugin`."""

import copy
import gc
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from backends import get_backend
from backends.base import Backend, GradsFn, LossFn, Named, Positive, norms_of, own_copy, register
from backends.batch import Batch
from backends.derived import weighted_sum
from backends.execution import compiled

Spoil = Callable[[Named], Any]

SPOILT: dict[str, Spoil] = {
    "zeros": lambda g: {k: torch.zeros_like(t) for k, t in g.items()},
    "averaged": lambda g: {k: t / len(t) for k, t in g.items()},
    "permuted": lambda g: {k: t.roll(1, 0) for k, t in g.items()},
    "one_row_repeated": lambda g: {k: t[:1].expand_as(t).clone() for k, t in g.items()},
    "one_parameter_scaled": lambda g: {k: t * (1.001 if i == 0 else 1) for i, (k, t) in enumerate(g.items())},
    "nan": lambda g: {k: torch.full_like(t, torch.nan) for k, t in g.items()},
    "missing": lambda g: dict(list(g.items())[1:]),
    "extra": lambda g: {**g, "other": next(iter(g.values()))},
    "transposed": lambda g: {k: t.transpose(-1, -2) if t.dim() == 3 else t for k, t in g.items()},
    "summed": lambda g: {k: t.sum(0) for k, t in g.items()},
    "not_a_mapping": lambda g: list(g.values()),
}


def plant(name: str, spoil: Spoil) -> None:
    """Register a backend whose result is spoilt."""

    @register(f"planted_{name}")
    @dataclass(frozen=True)
    class Planted(Backend):
        def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
            right = get_backend("vmap").grads(model, loss_fn)
            return lambda inputs, targets: spoil(right(inputs, targets))

    Planted.__qualname__ = f"planted {name}"  # two classes of one name are told apart by it


for _name, _spoil in SPOILT.items():
    plant(_name, _spoil)


@register("planted_finite")
@dataclass(frozen=True)
class Finite(Backend):
    """Hides what is not finite: NaN and infinity are zero."""

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        right = get_backend("vmap").grads(model, loss_fn)
        return lambda inputs, targets: {k: t.nan_to_num(0, 0, 0) for k, t in right(inputs, targets).items()}


@register("planted_recompiled")
@dataclass(frozen=True)
class Recompiled(Backend):
    """Right, but what it compiles depends on a number that every call changes."""

    compile: bool = True

    own_modes: ClassVar[frozenset[str]] = frozenset({"compile"})

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        right, calls = get_backend("vmap").grads(model, loss_fn), [0]
        shifted = compiled(lambda t, count: t + count - count)

        def fn(inputs: Batch, targets: Tensor) -> Named:
            calls[0] += 1
            shifted(targets, float(calls[0]))
            return right(inputs, targets)

        return fn


@register("planted_drifting")
@dataclass(frozen=True)
class Drifting(Backend):
    """Right three times, then wrong."""

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        right, calls = get_backend("vmap").grads(model, loss_fn), [0]

        def fn(inputs: Batch, targets: Tensor) -> Named:
            calls[0] += 1
            return {k: t * (1 if calls[0] <= 3 else 1.01) for k, t in right(inputs, targets).items()}

        return fn


@register("planted_caching")
@dataclass(frozen=True)
class Caching(Backend):
    """Returns its first result for ever."""

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        right, kept = get_backend("vmap").grads(model, loss_fn), []

        def fn(inputs: Batch, targets: Tensor) -> Named:
            if not kept:
                kept.append(right(inputs, targets))
            return kept[0]

        return fn


@register("planted_mutating")
@dataclass(frozen=True)
class Mutating(Backend):
    """Right, but moves the caller's weights."""

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        right = get_backend("vmap").grads(model, loss_fn)

        def fn(inputs: Batch, targets: Tensor) -> Named:
            grads = right(inputs, targets)
            with torch.no_grad():
                next(model.parameters()).add_(1e-3)
            return grads

        return fn


@register("planted_stale_bias")
@dataclass(frozen=True)
class StaleBias(Backend):
    """Right, but keeps the biases it was built with."""

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        mine = own_copy(model)
        for name, p in mine.named_parameters():
            if name.endswith("bias"):
                p.data = p.data.clone()
        return get_backend("vmap").grads(mine, loss_fn)


class Calls:
    """A backend whose result, or whose deed, depends on the number of the call."""

    @staticmethod
    def plant(name: str, act: Callable[[int, nn.Module, Batch, Callable[[], Named]], Any]) -> None:
        @register(f"planted_{name}")
        @dataclass(frozen=True)
        class Planted(Backend):
            def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
                right, calls = get_backend("vmap").grads(model, loss_fn), [0]

                def fn(inputs: Batch, targets: Tensor) -> Any:
                    calls[0] += 1
                    return act(calls[0], model, inputs, lambda: right(inputs, targets))

                return fn

        Planted.__qualname__ = f"planted {name}"


def _then(result: Named, *deeds: object) -> Named:
    return result


class Lazy(dict[str, Tensor]):
    """A dict that computes when it is read."""

    def __init__(self, compute: Callable[[], Named]) -> None:
        super().__init__()
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        return self._compute()[name]


class Late(Tensor):
    """A tensor that might compute when it is read."""


LAST: dict[str, Named] = {}


def _last_if_twice(call: int, model: nn.Module, inputs: Any, right: Callable[[], Named]) -> Named:
    """Return the last result where a sample is there twice, as in a batch that was drawn for timing."""
    if len(inputs.unique(dim=0)) == len(inputs) or str(inputs.dtype) not in LAST:
        LAST[str(inputs.dtype)] = right()
    return LAST[str(inputs.dtype)]


def _replaced(call: int, model: nn.Module, inputs: Any, right: Callable[[], Named]) -> Named:
    found, layer = right(), _layer(model)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    return found


def _layer(model: nn.Module) -> nn.Linear:
    return next(m for m in model.modules() if isinstance(m, nn.Linear))


KEPT: dict[tuple[int, str], Any] = {}
POINTER = "by pointer"


def _memo(call: int, model: nn.Module, inputs: Any, right: Callable[[], Named]) -> Named:
    key = (inputs.data_ptr(), f"{inputs.dtype}")
    if key not in KEPT:
        KEPT[key] = right()
    return KEPT[key]


BUFFER: dict[str, Tensor] = {}


def _alias(call: int, model: nn.Module, inputs: Any, right: Callable[[], Named]) -> Named:
    found = right()
    for name, g in found.items():
        old = BUFFER.get(f"{name} {g.shape} {g.dtype}")
        BUFFER[f"{name} {g.shape} {g.dtype}"] = found[name] = g.clone() if old is None else old.copy_(g)
    return found


OLD: list[list[Tensor]] = []


def _negates_the_last(call: int, model: nn.Module, inputs: Any, right: Callable[[], Named]) -> Named:
    for g in OLD.pop() if OLD else []:
        g.neg_()
    found = right()
    OLD.append([g for g in found.values() if g.dtype == torch.float32])
    return found


def _buffers(which: Callable[[int, Any], int]) -> Callable[..., Named]:
    def act(call: int, model: nn.Module, inputs: Any, right: Callable[[], Named]) -> Named:
        found = right()
        for name, g in found.items():
            place = f"{name} {g.shape} {g.dtype} {which(call, inputs)}"
            BUFFER[place] = found[name] = g.clone() if place not in BUFFER else BUFFER[place].copy_(g)
        return found

    return act


Calls.plant("memo", _memo)
Calls.plant("negates_the_last", _negates_the_last)
Calls.plant("two_buffers", _buffers(lambda call, inputs: call % 2))
Calls.plant("four_buffers", _buffers(lambda call, inputs: call % 4))
Calls.plant("buffers_by_pointer", _buffers(lambda call, inputs: inputs.data_ptr()))
Calls.plant("last_if_twice", _last_if_twice)
Calls.plant("replaced", _replaced)
Calls.plant("more_modules", lambda n, m, x, right: _then(right(), m.add_module(f"more {n}", nn.Linear(2, 2))))
Calls.plant("no_bias", lambda n, m, x, right: _then(right(), _layer(m).register_parameter("bias", None)))
Calls.plant("late", lambda n, m, x, right: {name: g.as_subclass(Late) for name, g in right().items()})
Calls.plant("uncollected", lambda n, m, x, right: _then(right(), gc.disable()))
Calls.plant("elsewhere", lambda n, m, x, right: _then(right(), os.chdir("/")))
Calls.plant("alias", _alias)
Calls.plant("lazy", lambda n, model, x, right: Lazy(right))
Calls.plant("late_weights", lambda n, m, x, right: _then(right(), n == 3 and next(m.parameters()).data.mul_(1.5)))
Calls.plant("inputs", lambda n, m, x, right: _then(right(), x.mul_(1.01)))
Calls.plant("hook", lambda n, m, x, right: _then(right(), m.register_forward_hook(lambda *_: None)))
Calls.plant("weight_hook", lambda n, m, x, right: _then(right(), next(m.parameters()).register_hook(torch.neg)))
Calls.plant("attribute", lambda n, m, x, right: _then(right(), setattr(next(m.parameters()), "grad_sample", 1)))
Calls.plant("seed", lambda n, m, x, right: _then(right(), random.seed(n)))
Calls.plant("deterministic", lambda n, m, x, right: _then(right(), torch.use_deterministic_algorithms(True)))
Calls.plant("coarse", lambda n, m, x, right: _then(right(), torch.set_float32_matmul_precision("medium")))
Calls.plant("gradients_off", lambda n, m, x, right: _then(right(), torch.set_grad_enabled(False)))
Calls.plant("threads", lambda n, m, x, right: _then(right(), torch.set_num_threads(torch.get_num_threads() + 1)))
Calls.plant("exit", lambda n, m, x, right: exit("bye"))


@register("planted_always_scaled")
@dataclass(frozen=True)
class AlwaysScaled(Backend):
    """Scales gradients to the clipping norm, also those that are shorter."""

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        return get_backend("vmap").grads(model, loss_fn)

    def clipped_sum(self, model: nn.Module, loss_fn: LossFn, *, max_norm: Positive = 1.0) -> GradsFn:
        grads = self.grads(model, loss_fn)

        def fn(inputs: Batch, targets: Tensor) -> Named:
            found = grads(inputs, targets)
            return {name: weighted_sum(max_norm / norms_of(found), g) for name, g in found.items()}

        return fn


@register("planted_never_clipped")
@dataclass(frozen=True)
class NeverClipped(AlwaysScaled):
    """Sums gradients as they are."""

    def clipped_sum(self, model: nn.Module, loss_fn: LossFn, *, max_norm: Positive = 1.0) -> GradsFn:
        grads = self.grads(model, loss_fn)
        return lambda inputs, targets: {name: g.sum(0) for name, g in grads(inputs, targets).items()}


@register("planted_stale")
@dataclass(frozen=True)
class Stale(Backend):
    """Right, for the weights as they were when it was built."""

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        return get_backend("vmap").grads(copy.deepcopy(model), loss_fn)
