"""What a caller may get wrong, whatever the backend: each call is looked at, and the first one closely.

A backend runs a copy of the model whose parameters share their values with the caller's. What reaches the caller's own
parameters all the same has no gradient there, and what no longer shares its memory would be computed with old values.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from backends.base import LossFn, Unsupported, full_copy, guarded
from backends.batch import Batch, apply, call, size, take, tensors
from backends.running import kept_random_state, modules

Fn = Callable[[Batch, Tensor], Any]

BUILT = "when this function was built"


def checked(fn: Fn, model: nn.Module, loss_fn: LossFn) -> Fn:
    """Return a backend's function, which refuses what it would get wrong for the way it is called.

    Args:
        fn: The function of (inputs, targets).
        model: The caller's, of which the backend has made a copy just now.
        loss_fn: The loss.

    Raises:
        ValueError: By the returned function: inputs are no batch, or there are not as many targets.
        Unsupported: By it too: a tensor is sparse; the model has changed otherwise than by a step of its parameters; it
            or the loss uses the caller's parameters, or changes them.
    """
    held = _Held(model)
    first = True

    def run(inputs: Batch, targets: Tensor) -> Any:  # noqa: ANN401  as the function
        nonlocal first
        n = size(inputs)
        if not isinstance(targets, Tensor) or targets.dim() == 0 or targets.shape[0] != n:
            found = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(f"targets are a tensor [N, ...] of as many as the inputs' {n} samples, found {found}")
        for t in (*tensors(inputs), targets):
            if t.layout != torch.strided:
                raise Unsupported(f"a batch holds dense tensors, found one of layout {t.layout}")
        if change := held.change():
            raise Unsupported(f"{change}; build it anew")
        with torch.inference_mode(mode=False) if torch.is_inference_mode_enabled() else nullcontext():
            inputs, targets = apply(_ordinary, inputs), _ordinary(targets)
            if first:
                _refuse_what_has_no_copy(model, loss_fn, inputs, targets)
                first = False
            return fn(inputs, targets)

    return run


class _Held:
    """What a backend's copy of a model has as it was, of which a change to the model shows nothing in the copy.

    Of attributes, that is those which are floating-point numbers (a temperature, the share that is dropped): others are
    too often caches, or parts of the model that come and go.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.found = model, modules(model)
        named = [*model.named_modules()]
        self.numbers = [
            (_named(path, name), vars(m), name, value)
            for path, m in named
            for name, value in vars(m).items()
            if isinstance(value, float) or name == "training"
        ]
        self.parameters = [
            (_named(path, name), m._parameters, name, p, p.data_ptr(), p.requires_grad)
            for path, m in named
            for name, p in m._parameters.items()
            if p is not None
        ]
        self.buffers = [
            [_named(path, name), m._buffers, name, b, b._version, b.clone()]
            for path, m in named
            for name, b in m._buffers.items()
            if b is not None
        ]

    def change(self) -> str:
        """Return what is not as it was when the function was built; nothing where all is."""
        for path, now, name, value in self.numbers:
            if now.get(name) != value:
                return f"`{path}` is {now.get(name)}, and was {value} {BUILT}"
        for path, now, name, p, memory, requires_grad in self.parameters:
            if now.get(name) is not p or p.data_ptr() != memory:
                return (
                    f"`{path}` has other memory than {BUILT} (by `.data = ...`, `.to(...)`, say), "
                    "or is another parameter, so its values would be old ones"
                )
            if p.requires_grad != requires_grad:
                return f"`{path}` has requires_grad={p.requires_grad}, and had {requires_grad} {BUILT}"
        for buffer in self.buffers:
            path, now, name, b, version, value = buffer
            if (found := now.get(name)) is not b or b._version != version:
                if found is None or found.shape != value.shape:
                    continue  # a cache, which comes, goes and grows
                if not _equal(found, value):
                    return f"the buffer `{path}` has other values than {BUILT}"
                buffer[3:5] = found, found._version
        if modules(self.model) != self.found:
            return f"the model has other modules than {BUILT}"
        return ""


def _named(path: str, name: str) -> str:
    return f"{path}{'.' * bool(path)}{name}"


def _ordinary(t: Tensor) -> Tensor:
    """Return a tensor that autograd knows: one made under `torch.inference_mode` it does not."""
    return t.clone() if t.is_inference() else t


def _refuse_what_has_no_copy(model: nn.Module, loss_fn: LossFn, inputs: Batch, targets: Tensor) -> None:
    """Refuse a model whose copy does not run by itself, or changes its parameters: seen on one sample."""
    if not guarded():
        return
    one, target = take(inputs, slice(0, 1)), targets[:1]
    plain = full_copy(model)
    own = dict(plain.named_parameters())
    before = {name: (p.data_ptr(), p._version) for name, p in own.items()}
    with torch.enable_grad(), kept_random_state(plain):
        try:
            losses = loss_fn(call(plain, apply(torch.clone, one)), target.clone())
        except Exception:  # whatever a model's code may raise: the backend will say it in its own words
            return
    given = dict(model.named_parameters())
    for name, p in own.items():
        if (p.data_ptr(), p._version) != before[name] or not _equal(p.detach(), given[name].detach()):  # by `.data`
            raise Unsupported(f"the model changes its parameter `{name}` while it runs")
    if isinstance(losses, Tensor):
        refuse_past_the_copy(model, losses)


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())  # NaN equals itself here


def refuse_past_the_copy(model: nn.Module, losses: Tensor) -> None:
    """Refuse the losses of a copy if they depend on the original's parameters.

    Raises:
        Unsupported: They do.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    waiting, seen = [losses.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if name := names.get(id(getattr(node, "variable", None))):  # a leaf of autograd's graph
            raise Unsupported(
                f"`{name}` of the model itself is used, not only of the copy that a backend runs, so that gradient "
                "would be missing: by the loss (let the model return what it needs), or by code that holds it "
                "elsewhere than in its module (a global, a closure, a weak reference)"
            )
        waiting += [following for following, _ in node.next_functions]
