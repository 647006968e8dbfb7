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
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import Field
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from backends import derived
from backends.closures import bind_anew
from backends.derived import GradsFn as GradsFn  # a backend's file finds all of its contract here
from backends.derived import Named as Named
from backends.derived import TensorFn as TensorFn
from backends.derived import check_max_norm as check_max_norm
from backends.derived import clip_factors as clip_factors
from backends.derived import norms_of as norms_of
from backends.derived import rows_of as rows_of
from backends.refusals import Unavailable as Unavailable
from backends.refusals import Unsupported as Unsupported
from backends.refusals import Wrong as Wrong
from backends.refusals import describe as describe
from backends.refusals import first_line as first_line
from backends.refusals import first_line_of as first_line_of
from backends.refusals import guarded as guarded
from backends.refusals import owns_trained as owns_trained
from backends.refusals import place_of as place_of
from backends.refusals import refuse_impure
from backends.refusals import refuse_wrong as refuse_wrong
from backends.refusals import unguarded as unguarded
from backends.registry import Registry

LossFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(outputs [N, ...], targets [N, ...]) -> losses [N]: one loss a sample, never reduced over samples."""

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]

QUANTITIES = ("grads", "norms", "clipped_sum", "variance", "gram")
MODES = ("chunk_size", "compile", "cuda_graph", "autocast")  # how any backend may be run: `execution.py`


@dataclass(frozen=True, kw_only=True)
class Backend(ABC):
    """One way to compute per-sample gradients.

    `grads` is required; the other quantities have a default derived from it, which a subclass overrides where it has
    a cheaper way. Every method builds and returns `fn(inputs, targets)`; both may raise `Unsupported`.

    Results are detached, on the model's device and in the parameters' dtype. The caller's model, its `.grad`, hooks,
    buffers and the global random state stay as they were; in-place updates of its parameters are seen by later calls.

    Options that every backend has (`get_backend` sees to all but `chunk_bytes`):

    Options:
        chunk_size: Samples at a time. None: all that `chunk_bytes` allows, or all at once in a native way.
        chunk_bytes: The most bytes of per-sample gradients that a derived quantity holds at a time. None: 32 MiB on a
            CPU, where larger blocks are fresh memory at every call (1 GiB for `gram`, which would have to compute
            gradients again); an eighth of a GPU's memory.
        compile: Run through `torch.compile`.
        cuda_graph: Record the call once for each form of input, and replay it (CUDA only).
        autocast: Compute under `torch.autocast` in this dtype.
    """

    name: ClassVar[str]
    requires: ClassVar[Mapping[str, str]]  # import name -> what `pip install` calls it
    reference: ClassVar[bool] = False  # the backend that others are compared with; one is
    float64: ClassVar[bool] = True  # False: no float64 path, "the same function?" cannot be asked
    quantities: ClassVar[tuple[str, ...]] = QUANTITIES  # what it computes at all; it refuses the others
    narrow: ClassVar[bool] = False  # True: it refuses everyday models too, since it knows few layers
    own_modes: ClassVar[frozenset[str]] = frozenset()  # of MODES, those that the class sees to by itself

    chunk_size: Count | None = None
    chunk_bytes: Count | None = None
    compile: bool = False
    cuda_graph: bool = False
    autocast: Literal["bfloat16", "float16"] | None = None

    @abstractmethod
    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the function for g_i: {name: [N, *shape]}; a tied parameter is one entry, an unused one zeros."""

    def norms(self, model: nn.Module, loss_fn: LossFn) -> TensorFn:
        """Build the function for ‖g_i‖₂ over all trainable parameters together: [N]."""
        return derived.norms(self.grads(model, loss_fn), self.at_a_time(model))

    def clipped_sum(self, model: nn.Module, loss_fn: LossFn, *, max_norm: Positive = 1.0) -> GradsFn:
        """Build the function for Σ_i min(1, C/‖g_i‖) g_i, flat clipping (Abadi et al. 2016): {name: [*shape]}."""
        return derived.clipped_sum(self.grads(model, loss_fn), self.at_a_time(model), max_norm)

    def variance(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the function for the elementwise 1/N Σ (g_i − ḡ)²: {name: [*shape]}."""
        return derived.variance(self.grads(model, loss_fn), self.at_a_time(model))

    def gram(self, model: nn.Module, loss_fn: LossFn) -> TensorFn:
        """Build the function for ⟨g_i, g_j⟩ (gradient similarity, empirical NTK): [N, N]."""
        return derived.gram(self.grads(model, loss_fn), self.at_a_time(model), self._within_bytes(model, held=True))

    def at_a_time(self, model: nn.Module) -> int:
        """Return how many samples a derived quantity takes at a time."""
        most = self._within_bytes(model)
        return min(self.chunk_size or most, most)

    def _within_bytes(self, model: nn.Module, *, held: bool = False) -> int:
        """Return how many samples' gradients `chunk_bytes` allows, computed at a time or held; one at least."""
        parameters = list(trainable(model).values())
        a_sample = sum(p.numel() * p.element_size() for p in parameters) or 1
        return max(1, (self.chunk_bytes or derived.default_bytes(parameters, held=held)) // a_sample)

    @property
    def keeps_results(self) -> bool:
        """Whether results stay valid after the next call, as they shall; an option may give that up for speed."""
        return True

    def choices(self) -> Mapping[str, str]:
        """Return what has been chosen by measuring in this process, by what it was chosen for: part of the record."""
        return {}

    @classmethod  # noqa: B027  most backends keep nothing
    def release(cls) -> None:
        """Give back memory that is kept for results to come: it counts as the next call's when memory is measured."""

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

    @classmethod
    def way(cls, quantity: str) -> bool | None:
        """Return whether its way to a quantity is native; None where it does not compute it at all."""
        return cls.native(quantity) if quantity in cls.quantities else None


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
    return full_copy(model, {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()})


def full_copy(model: nn.Module, known: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Return a copy of the model with values of its own, but for tensors whose copies are `known` by identity.

    Raises:
        Unsupported: The model cannot be copied.
    """
    copies: dict[int, Any] = {id(t): t.detach().clone() for t in _computed_anew(model)} | dict(known or {})
    try:
        copied = copy.deepcopy(model, copies)
    except Exception as error:
        why = _left_by_a_pass(model) or f"copy.deepcopy: {first_line(error)}"
        raise Unsupported(f"the model cannot be copied ({why})") from error
    bind_anew(copied, copies)
    return copied


def _computed_anew(model: nn.Module) -> Iterator[Tensor]:
    """Yield weights that a hook computes before each call (weight_norm, pruning): torch does not copy them itself."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
            if isinstance(weight := vars(module).get(str(name)), Tensor):
                yield weight


def _left_by_a_pass(model: nn.Module) -> str:
    """Return which attribute holds a tensor with a history, which cannot be copied; nothing where none does."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if not name.startswith("_") and any(isinstance(t, Tensor) and t.grad_fn for t in tree_leaves(value)):
                where = f"{path}{'.' * bool(path)}{name}"
                return f"`{where}` holds a tensor that autograd has made, as of an earlier pass; detach it or drop it"
    return ""
