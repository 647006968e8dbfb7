"""How a backend refuses: the exceptions, the switch that lets libraries have their way, and the words."""

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

Wrong: TypeAlias = Callable[[nn.Module], str | None]
"""A layer -> why a library would be silently wrong on it, or None; its docstring names the case that proves it."""


class Unsupported(Exception):
    """A backend refuses: the reason names the module path, the option and why."""


class Unavailable(Exception):
    """A backend's library is not installed: the reason says how to install it."""


_GUARDED: ContextVar[bool] = ContextVar("guarded", default=True)


def guarded() -> bool:
    """Return whether backends refuse what their library would silently get wrong; it is so unless `unguarded`."""
    return _GUARDED.get()


@contextmanager
def unguarded() -> Iterator[None]:
    """Let backends return what their library returns, right or wrong, for as long as the block runs.

    A rule that exists because a *library is silently wrong* asks `guarded()` first; so what the library would return
    can be seen, and every rule can be shown to be needed. Refusals because the library itself raises stay.
    """
    token = _GUARDED.set(False)
    try:
        yield
    finally:
        _GUARDED.reset(token)


def owns_trained(module: nn.Module) -> bool:
    """Return whether a module has parameters of its own that are trained."""
    return any(p.requires_grad for p in module.parameters(recurse=False))


def refuse_wrong(path: str, layer: nn.Module, rules: Iterable[Wrong]) -> None:
    """Refuse a layer for the first of the rules that finds something, unless `unguarded`.

    Raises:
        Unsupported: One does.
    """
    for wrong in rules if guarded() else ():
        if reason := wrong(layer):
            raise Unsupported(f"{describe(path, layer, options=True)}: {reason}")


def refuse_impure(model: nn.Module) -> None:
    """Refuse modules whose samples have no gradients of their own, or that change their weights, or that have no copy.

    Raises:
        Unsupported: A parameter without a shape or values, or with a hook on its gradient; BatchNorm in training mode
            or without running statistics, an embedding with `max_norm` or `scale_grad_by_freq`, a scripted or traced
            module, a recurrent layer in eval mode on CUDA.
    """
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise Unsupported(f"`{name}` has no shape yet; run the model once")
        if p.is_meta:
            raise Unsupported(f"`{name}` is on the meta device, without values; initialise it first")
        if p.requires_grad and p._backward_hooks:
            raise Unsupported(
                f"`{name}` has a hook on its gradient (register_hook), of which a backend's copy has none; "
                "remove it, and apply it to what comes back"
            )
    for path, module in model.named_modules():
        where, kind = f"`{path or 'model'}`", type(module).__name__
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            option = "in training mode" if module.training else "with track_running_stats=False"
            raise Unsupported(
                f"{where} ({kind}) {option} mixes the samples of a batch, "
                "so no sample has a gradient of its own; use eval() or GroupNorm"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise Unsupported(f"{where} ({kind}) is scripted: a copy of it has parameters that do not follow yours")
        if isinstance(module, nn.RNNBase) and not module.training and _by_cudnn(module):
            raise Unsupported(
                f"{where} ({kind}) in eval mode is run by cuDNN, which has no backward pass for that; "
                "use train(), or torch.backends.cudnn.enabled = False"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.weight.requires_grad:
            if module.max_norm is not None:
                raise Unsupported(f"{where} ({kind}(max_norm={module.max_norm})) changes its weights while it runs")
            if module.scale_grad_by_freq:
                raise Unsupported(
                    f"{where} ({kind}(scale_grad_by_freq=True)) divides gradients by counts over the batch, "
                    "so no sample has a gradient of its own"
                )


def _by_cudnn(module: nn.Module) -> bool:
    """Return whether cuDNN runs a module that is trained."""
    return any(p.requires_grad and p.is_cuda and torch.backends.cudnn.is_acceptable(p) for p in module.parameters())


def describe(path: str, module: nn.Module, *, options: bool = False) -> str:
    """Return "`path` (Type)" for a message, or "`path` (Type(its options))" for a module without children."""
    leaf = not any(True for _ in module.children())
    return f"`{path or 'model'}` ({first_line_of(repr(module)) if options and leaf else type(module).__name__})"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name when it has none."""
    return first_line_of(str(error)) or type(error).__name__


def place_of(error: BaseException) -> str:
    """Return where an error was raised: "file.py:12, in forward"."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"


def first_line_of(text: str) -> str:
    """Return the first line of a text that is not empty, or an empty string."""
    return next(iter(text.strip().splitlines()), "")
