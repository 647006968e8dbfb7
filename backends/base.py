"""The contract of a backend: what it is given, what it returns, how it refuses.

A backend computes per-sample gradients, the gradient of *each sample's own loss* in a batch of N, and what people
derive from them. It is a frozen dataclass whose fields are its options, registered by name:

    @register("mine")
    @dataclass(frozen=True)
    class Mine(Backend):
        def grads(self, model, loss_fn):
            model = own_copy(model)
            def fn(inputs, targets):
                ...
            return fn

Building (`grads(model, loss_fn)`: copying, hooks, tracing) is timed apart from calling `fn`. See `backends/README.md`.
"""

import copy
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backends.batch import Batch
from backends.registry import Registry

LossFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(outputs [N, ...], targets [N, ...]) -> losses [N]: one loss a sample, never reduced over samples."""

Named: TypeAlias = dict[str, Tensor]
"""A tensor for each trainable parameter, by its `named_parameters()` name."""

GradsFn: TypeAlias = Callable[[Batch, Tensor], Named]
"""(inputs, targets) -> {name: [N, *parameter.shape]}."""

TensorFn: TypeAlias = Callable[[Batch, Tensor], Tensor]
"""(inputs, targets) -> one tensor."""

QUANTITIES = ("grads", "norms", "clipped_sum", "variance", "gram")


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


@dataclass(frozen=True)
class Backend(ABC):
    """One way to compute per-sample gradients.

    `grads` is required; the other quantities have a default derived from it, which a subclass overrides where it has
    a cheaper way. Every method builds and returns `fn(inputs, targets)`; both may raise `Unsupported`.

    Results are detached, on the model's device and in the parameters' dtype. The caller's model, its `.grad`, hooks,
    buffers and the global random state stay as they were; in-place updates of its parameters are seen by later calls.
    """

    name: ClassVar[str]
    requires: ClassVar[Mapping[str, str]]  # import name -> what `pip install` calls it
    reference: ClassVar[bool] = False  # the backend that others are compared with; one is
    float64: ClassVar[bool] = True  # False: no float64 path, "the same function?" cannot be asked

    @abstractmethod
    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the function for g_i: {name: [N, *shape]}; a tied parameter is one entry, an unused one zeros."""

    def norms(self, model: nn.Module, loss_fn: LossFn) -> TensorFn:
        """Build the function for ‖g_i‖₂ over all trainable parameters together: [N]."""
        grads = self.grads(model, loss_fn)
        return lambda inputs, targets: norms_of(grads(inputs, targets))

    def clipped_sum(self, model: nn.Module, loss_fn: LossFn, *, max_norm: float = 1.0) -> GradsFn:
        """Build the function for Σ_i min(1, C/‖g_i‖) g_i, flat clipping (Abadi et al. 2016): {name: [*shape]}."""
        grads = self.grads(model, loss_fn)

        def fn(inputs: Batch, targets: Tensor) -> Named:
            g = grads(inputs, targets)
            factors = clip_factors(norms_of(g), max_norm)
            return {name: torch.einsum("n,n...->...", factors.to(t.dtype), t) for name, t in g.items()}

        return fn

    def variance(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the function for the elementwise 1/N Σ (g_i − ḡ)²: {name: [*shape]}."""
        grads = self.grads(model, loss_fn)
        return lambda inputs, targets: {k: t.var(0, correction=0) for k, t in grads(inputs, targets).items()}

    def gram(self, model: nn.Module, loss_fn: LossFn) -> TensorFn:
        """Build the function for ⟨g_i, g_j⟩ (gradient similarity, empirical NTK): [N, N]."""
        grads = self.grads(model, loss_fn)

        def fn(inputs: Batch, targets: Tensor) -> Tensor:
            rows = [rows_of(t) for t in grads(inputs, targets).values()]
            return torch.stack([r @ r.T for r in rows]).sum(0)

        return fn

    @classmethod
    def load(cls) -> None:
        """Import the backend's libraries, so that the time of it is known and its absence is a status.

        Raises:
            Unavailable: A library is not installed. Any other import error escapes: it is a fault, not an absence.
        """
        for module, package in cls.requires.items():
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise
                raise Unavailable(f"pip install {package}") from None

    @classmethod
    def native(cls, quantity: str) -> bool:
        """Return whether the backend has its own way to a quantity, not the default derived from `grads`."""
        return getattr(cls, quantity) is not getattr(Backend, quantity)


BackendType = TypeVar("BackendType", bound=type[Backend])

BACKENDS: Registry[type[Backend]] = Registry("backend")


def register(name: str, *, requires: Mapping[str, str] | None = None) -> Callable[[BackendType], BackendType]:
    """Return the decorator that registers a backend.

    Args:
        name: The name in YAML, on the command line and in tables.
        requires: The libraries its methods import: import name -> name for `pip install`.
    """

    def decorate(cls: BackendType) -> BackendType:
        if not (isinstance(cls, type) and issubclass(cls, Backend) and "__dataclass_params__" in vars(cls)):
            raise TypeError(f"backend '{name}' must be a class derived from Backend, under @dataclass(frozen=True)")
        cls.name, cls.requires = name, dict(requires or {})
        BACKENDS.add(name, cls)
        return cls

    return decorate


def rows_of(grads: Tensor) -> Tensor:
    """Return per-sample gradients [N, *shape] as rows [N, numbers]; a scalar parameter's have one number each."""
    return grads.flatten(1) if grads.dim() > 1 else grads[:, None]


def norms_of(grads: Named) -> Tensor:
    """Return ‖g_i‖₂ [N] of per-sample gradients; half precision is summed in float32."""
    some = next(iter(grads.values()))
    wide = torch.promote_types(some.dtype, torch.float32)
    squares = [torch.linalg.vector_norm(rows_of(t), dim=1, dtype=wide).square() for t in grads.values()]
    return torch.stack(squares).sum(0).sqrt().to(some.dtype)


def clip_factors(norms: Tensor, max_norm: float) -> Tensor:
    """Return min(1, C/‖g_i‖) [N]; a zero gradient has factor 1, a nonfinite norm a nonfinite or zero factor."""
    return (max_norm / norms).clamp(max=1.0)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that per-sample gradients are wanted for; a tied one is there once, by its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def own_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model that a backend may hook, extend and run without the caller noticing.

    The copy has its own modules, hooks, buffers and `.grad`. Its parameters share their *values* with the caller's,
    so that an optimizer's in-place step is seen. Everything else (train or eval mode, buffers) is as it is now.

    Raises:
        Unsupported: The model cannot be copied, has nothing to differentiate, or `refuse_impure` refuses it.
    """
    refuse_impure(model)
    if not trainable(model):
        raise Unsupported("the model has no trainable parameter: nothing to differentiate")
    parameters = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    try:
        return copy.deepcopy(model, parameters)
    except Exception as error:
        raise Unsupported(f"the model cannot be copied (copy.deepcopy: {first_line(error)})") from error


def refuse_impure(model: nn.Module) -> None:
    """Refuse modules whose samples have no gradients of their own, or that change their weights while they run.

    Raises:
        Unsupported: BatchNorm in training mode or without running statistics, an embedding with `max_norm` or
            `scale_grad_by_freq`.
    """
    for path, module in model.named_modules():
        where, kind = f"`{path or 'model'}`", type(module).__name__
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            option = "in training mode" if module.training else "with track_running_stats=False"
            raise Unsupported(
                f"{where} ({kind}) {option} mixes the samples of a batch, "
                "so no sample has a gradient of its own; use eval() or GroupNorm"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.weight.requires_grad:
            if module.max_norm is not None:
                raise Unsupported(f"{where} ({kind}(max_norm={module.max_norm})) changes its weights while it runs")
            if module.scale_grad_by_freq:
                raise Unsupported(
                    f"{where} ({kind}(scale_grad_by_freq=True)) divides gradients by counts over the batch, "
                    "so no sample has a gradient of its own"
                )


def describe(path: str, module: nn.Module, *, options: bool = False) -> str:
    """Return "`path` (Type)" for a message, or "`path` (Type(its options))" for a module without children."""
    leaf = not any(True for _ in module.children())
    return f"`{path or 'model'}` ({first_line_of(repr(module)) if options and leaf else type(module).__name__})"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name when it has none."""
    return first_line_of(str(error)) or type(error).__name__


def first_line_of(text: str) -> str:
    """Return the first line of a text that is not empty, or an empty string."""
    return next(iter(text.strip().splitlines()), "")
