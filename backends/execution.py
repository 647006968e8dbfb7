"""How any backend may be run: in chunks, compiled, as a CUDA graph, under autocast; `get_backend` sees to it.

What a function is given is looked at first, whatever the backend (`given.py`).

A backend that knows a better way to one of these names it in `own_modes`, and sees to it by itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from backends import derived
from backends.base import MODES, Backend, GradsFn, LossFn, Positive, TensorFn, Unsupported, trainable
from backends.batch import Batch, form, size
from backends.given import checked
from backends.graphs import graphed
from backends.running import first_sentence

Fn = Callable[[Batch, Tensor], Any]

MERGED: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "grads": torch.cat,
    "norms": torch.cat,
    "clipped_sum": lambda parts: torch.stack(parts).sum(0),
}
"""How the results of chunks make the result of the batch; variance and Gram matrix need more than those."""


def executed(backend: Backend) -> Backend:
    """Return the backend run as its options ask for, but for what it sees to by itself."""
    return Executed(backend, frozenset(mode for mode in MODES if getattr(backend, mode)) - backend.own_modes)


@dataclass(frozen=True)
class Executed(Backend):
    """A backend, and how it is run.

    Attributes:
        inner: The backend.
        modes: Which of its options `MODES` are seen to here.
    """

    inner: Backend
    modes: frozenset[str]

    def __post_init__(self) -> None:
        facts = "name", "requires", "reference", "float64", "quantities", "narrow", "native", "way", "load", "release"
        for fact in (*facts, *MODES):
            object.__setattr__(self, fact, getattr(self.inner, fact))

    @property
    def keeps_results(self) -> bool:
        """Whether the backend's results stay valid."""
        return self.inner.keeps_results

    def choices(self) -> Mapping[str, str]:
        """Return what the backend has chosen."""
        return self.inner.choices()

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the backend's `grads`, run as asked for."""
        return self._build("grads", model, loss_fn)

    def norms(self, model: nn.Module, loss_fn: LossFn) -> TensorFn:
        """Build the backend's `norms`, run as asked for."""
        return self._build("norms", model, loss_fn)

    def clipped_sum(self, model: nn.Module, loss_fn: LossFn, *, max_norm: Positive = 1.0) -> GradsFn:
        """Build the backend's `clipped_sum`, run as asked for."""
        return self._build("clipped_sum", model, loss_fn, max_norm=max_norm)

    def variance(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the backend's `variance`, run as asked for."""
        return self._build("variance", model, loss_fn)

    def gram(self, model: nn.Module, loss_fn: LossFn) -> TensorFn:
        """Build the backend's `gram`, run as asked for."""
        return self._build("gram", model, loss_fn)

    def _build(self, quantity: str, model: nn.Module, loss_fn: LossFn, **options: Any) -> Fn:  # noqa: ANN401
        if not isinstance(model, nn.Module):
            raise TypeError(f"model should be a torch.nn.Module, found {type(model).__name__}")
        parameters = trainable(model)
        device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
        for name, p in parameters.items():
            if p.is_complex() and quantity != "grads":
                raise Unsupported(f"`{name}` is complex: of complex parameters there are only `grads`")
        if "cuda_graph" in self.modes and device.type != "cuda":
            raise Unsupported(f"`model` (cuda_graph=True): it is on {device}; CUDA graphs need it on a CUDA device")
        fn: Fn = getattr(self.inner, quantity)(model, loss_fn, **options)
        if "compile" in self.modes:
            fn = _compiled_after_a_look(fn)
        if "autocast" in self.modes:
            fn = _autocast(fn, device, getattr(torch, str(self.inner.autocast)), model)
        if "chunk_size" in self.modes and self.inner.chunk_size:
            fn = self._chunked(fn, quantity, self.inner.chunk_size)
        if "cuda_graph" in self.modes:
            fn = graphed(fn, kept=self.keeps_results or quantity != "grads")  # the only one that reuses buffers
        return checked(fn, model, loss_fn)

    def _chunked(self, fn: Fn, quantity: str, most: int) -> Fn:
        if quantity not in MERGED:
            if not self.inner.native(quantity):
                return fn  # the derived way takes chunks by itself
            return _whole(fn, quantity, most)

        def chunked(inputs: Batch, targets: Tensor) -> Any:  # noqa: ANN401  as the function
            parts = (fn(*chunk) for chunk in derived.chunks(inputs, targets, most))
            return _merged([part if self.keeps_results else tree_map(torch.clone, part) for part in parts], quantity)

        return chunked


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function run through `torch.compile`; it never falls back to eager mode without a word.

    A new form of input is compiled anew, with its shapes fixed. What is compiled too often, or not at all, is refused.
    """
    faster = torch.compile(function, dynamic=False)

    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  as the function
        with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
            try:
                return faster(*args, **kwargs)
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                raise Unsupported(f"`model` (compile=True): torch.compile: {first_sentence(error)}") from error

    return run


def _compiled_after_a_look(fn: Fn) -> Fn:
    """Return a function whose first call of each form runs as it is: the checks in it are not for a compiler."""
    faster, seen = compiled(fn), set[object]()

    def run(inputs: Batch, targets: Tensor) -> Any:  # noqa: ANN401  as the function
        if (this := form(inputs, targets)) not in seen:
            fn(inputs, targets)
            seen.add(this)
        return faster(inputs, targets)

    return run


def _autocast(fn: Fn, device: torch.device, dtype: torch.dtype, model: nn.Module) -> Fn:
    """Return a function run under autocast; its results are in the parameters' dtype, as the contract asks."""
    dtypes = {name: p.dtype for name, p in trainable(model).items()}
    widest = next(iter(dtypes.values()))

    def run(inputs: Batch, targets: Tensor) -> Any:  # noqa: ANN401  as the function
        with torch.autocast(device.type, dtype):
            result = fn(inputs, targets)
        if isinstance(result, Tensor):
            return result.to(widest)
        return {name: t.to(dtypes[name]) for name, t in result.items()}

    return run


def _merged(parts: list[Any], quantity: str) -> Any:  # noqa: ANN401  a tensor, or tensors by name
    merge = MERGED[quantity]
    if isinstance(parts[0], Tensor):
        return merge(parts)
    return {name: merge([part.pop(name) for part in parts]) for name in list(parts[0])}


def _whole(fn: Fn, quantity: str, most: int) -> Fn:
    """Return a function that takes batches of at most so many samples: what larger ones need cannot be merged."""

    def run(inputs: Batch, targets: Tensor) -> Any:  # noqa: ANN401  as the function
        if size(inputs) > most:
            raise Unsupported(
                f"`model` (chunk_size={most}): the {quantity} of {size(inputs)} samples cannot be put together from "
                f"that of chunks; leave chunk_size out"
            )
        return fn(inputs, targets)

    return run
