"""How a model uses its parameters: seen by running a plain copy of it, without any library, on a few of its samples.

A library that computes per-sample gradients from what goes into a layer and what comes back takes row i of both for
sample i. `uses` finds out whether that is so: it sends a gradient into the outputs of one sample and looks which rows
of each watched call it reaches. That sees what no shape shows: samples that are reordered inside the model, a batch on
another axis of equal length, one result that is broadcast over the batch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from backends.base import describe, trainable
from backends.batch import Batch, apply, call, size, take, tensors
from backends.running import kept_buffers

SAMPLES = 3  # of two, a permutation may fix both; three are not fixed by reversing, rolling, halving or interleaving


@dataclass(frozen=True)
class Hooked:
    """A module that a library hooks.

    Attributes:
        module: The module.
        deep: Its rule covers the parameters of its children too.
        reruns: Its rule runs the module anew, on the one tensor that went in.
    """

    module: nn.Module
    deep: bool = False
    reruns: bool = False

    def covered(self) -> set[int]:
        """Return the identities of the parameters that the rule covers."""
        return {id(p) for p in self.module.parameters(recurse=self.deep)}


@dataclass(frozen=True)
class Rows:
    """Where the samples are in a tensor: along `axis`, in order, or as `samples` says of each place on it."""

    tensor: Tensor
    axis: int = 0
    samples: Tensor | None = None

    def count(self) -> int:
        """Return how many samples there seem to be."""
        if self.samples is not None:
            return int(self.samples.max()) + 1
        return self.tensor.shape[self.axis] if self.tensor.dim() > self.axis else 0

    def reached(self, grad: Tensor) -> list[int]:
        """Return the samples in whose rows a gradient of the tensor is not zero."""
        rows = grad.detach().nan_to_num(0).movedim(self.axis, 0).flatten(1) if grad.dim() > 1 else grad[:, None]
        found = (rows != 0).any(1).nonzero().flatten()
        return [int(i) for i in (found if self.samples is None else self.samples.to(found.device)[found]).unique()]


RowsOf: TypeAlias = Callable[[Any, Any, Any], tuple[list[Rows], list[Rows]]]
"""(function, its arguments, its result) -> where the library takes the samples to be, going in and coming out."""


@dataclass
class Use:
    """A use of parameters: by the call of a hooked module, or by a function outside of one (`hooked` is None).

    Attributes:
        by: The module or function, described.
        parameters: Their names.
        hooked: The module.
        samples: How many samples the model was run on.
        sample: From whose outputs a gradient was sent.
        tensors_in: How many tensors went in.
        tensors_out: How many came out.
        counts: How many samples there seem to be in each.
        keywords: Whether a tensor went in as a keyword.
        altered: What was not the module's own: "input" or "output" that the caller's hooks changed, "weights".
        strays: Rows of the output that the gradient reached, though they are not that sample's.
        differentiated: Whether the forward pass itself took a gradient through the call.
    """

    by: str
    parameters: tuple[str, ...]
    hooked: Hooked | None
    samples: int
    sample: int
    tensors_in: int
    tensors_out: int
    counts: tuple[int, ...]
    keywords: bool = False
    altered: frozenset[str] = frozenset()
    strays: list[int] = field(default_factory=list)
    differentiated: bool = False


def batch_first(function: object, inputs: Any, output: Any) -> tuple[list[Rows], list[Rows]]:  # noqa: ANN401
    """Return the samples on the first axis of all that goes in, and of the first tensor that comes out."""
    return [Rows(t) for t in tensors_in(inputs)], [Rows(t) for t in tensors_in(output)[:1]]


def tensors_in(tree: Any) -> list[Tensor]:  # noqa: ANN401  what hooks and functions are called with
    """Return the tensors in nested tuples, lists and dicts."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


@dataclass
class _Watch(TorchFunctionMode):
    """Records the calls of hooked modules, and differentiable uses of parameters outside of them."""

    hooked: Mapping[str, Hooked]
    names: Mapping[int, str]
    samples: int
    sample: int
    rows_of: RowsOf
    uses: list[Use] = field(default_factory=list)
    inside: list[tuple[str, list[tuple[int, int]]]] = field(default_factory=list)
    backward: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.covered = {path: h.covered() for path, h in self.hooked.items()}
        self.returned: list[tuple[int, int]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs: first and last of each module's hooks, to see what others do."""
        handles = []
        for path, h in self.hooked.items():
            first, last = h.module.register_forward_pre_hook, h.module.register_forward_hook
            handles += [
                first(lambda _, args, path=path: self.inside.append((path, _state(args))), prepend=True),
                last(lambda _, args, output: setattr(self, "returned", _state(args) + _state(output)), prepend=True),
                last(self._left, with_kwargs=True, always_call=True),
            ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _left(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ANN401
        path, before = self.inside.pop()
        if not torch.is_grad_enabled():
            return
        arrived, returned = _state(args), _state(args) + _state(output)
        pairs: dict[str, tuple[object, object]] = {
            "input": (before, arrived),
            "output": (self.returned, returned),
            "weights": (self.covered[path], self.hooked[path].covered()),  # torch.func.functional_call swaps them
        }
        parameters = tuple(name for p, name in self.names.items() if p in self.covered[path])
        self._record(
            batch_first(module, args, output),
            by=describe(path, module),
            parameters=parameters,
            hooked=self.hooked[path],
            tensors_in=len(arrived),
            tensors_out=len(tensors_in(output)),
            keywords=bool(tensors_in(kwargs)),
            altered=frozenset(what for what, (one, two) in pairs.items() if one != two),
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        if any(t.requires_grad for t in tensors_in(result)):  # not a size, a dtype, something detached
            inside = set().union(*(self.covered[path] for path, _ in self.inside))
            found = {id(t): t for t in tensors_in((args, kwargs)) if id(t) in self.names}
            if missed := tuple(self.names[p] for p in found if p not in inside):
                by = f"{resolve_name(func) or func} with parameter `{missed[0]}`"
                others = [t for t in tensors_in((args, kwargs)) if id(t) not in found]
                self._record(
                    self.rows_of(func, args, result),
                    by=by,
                    parameters=missed,
                    hooked=None,
                    tensors_in=len(others),
                    tensors_out=len(tensors_in(result)),
                )
        return result

    def _record(self, rows: tuple[list[Rows], list[Rows]], **about: Any) -> None:  # noqa: ANN401
        if self.backward and set(about["parameters"]) <= {name for use in self.uses for name in use.parameters}:
            return  # a checkpoint that runs again what has been seen; one that hid it from autograd is seen only now
        counts = tuple(r.count() for r in rows[0] + rows[1])
        use = Use(samples=self.samples, sample=self.sample, counts=counts, **about)
        self.uses.append(use)

        def look(grad: Tensor, where: Rows) -> None:
            if self.backward:
                use.strays += [i for i in where.reached(grad) if i != self.sample]
            else:
                use.differentiated = True

        for where in rows[1]:
            if where.tensor.requires_grad:
                where.tensor.register_hook(lambda grad, where=where: look(grad, where))


def _state(tree: Any) -> list[tuple[int, int]]:  # noqa: ANN401
    """Return what tells whether a hook has replaced a tensor or changed it in place."""
    return [(id(t), t._version) for t in tensors_in(tree)]


def uses(
    model: nn.Module, hooked: Mapping[str, Hooked], inputs: Batch, sample: int, rows_of: RowsOf = batch_first
) -> list[Use]:
    """Run a model forward, and backward from the outputs of one sample; return how it used its parameters.

    Args:
        model: The model; its `.grad` is overwritten, and the global random state moves on.
        hooked: The modules that a library hooks, by path.
        inputs: The samples.
        sample: Which one's outputs to start from.
        rows_of: Where the library takes the samples to be in a function outside of hooked modules.
    """
    watch = _Watch(hooked, {id(p): name for name, p in trainable(model).items()}, size(inputs), sample, rows_of)
    with kept_buffers(model), torch.enable_grad(), watch.watching():
        found = [t for t in tensors_in(call(model, inputs)) if t.requires_grad and t.dim() and len(t) == size(inputs)]
        watch.backward = True
        if found:
            torch.autograd.backward(found, [_only(sample, t) for t in found])
    model.zero_grad(set_to_none=True)
    return watch.uses


def _only(sample: int, outputs: Tensor) -> Tensor:
    """Return a gradient of the outputs that is zero but for one sample; uneven, since a softmax swallows equal ones."""
    grad = torch.zeros_like(outputs)
    grad[sample] = torch.linspace(1, 2, grad[sample].numel(), device=grad.device).view_as(grad[sample]).to(grad)
    return grad


def some(inputs: Batch) -> list[Batch]:
    """Return small batches that show what a model does with its samples: one, and a few, in order and backwards.

    Backwards too, because a model that sorts its samples leaves one of the two as it is. One sample alone has no order.
    """
    if size(inputs) == 1:
        return [inputs]
    first = torch.arange(SAMPLES, device=tensors(inputs)[0].device) % size(inputs)
    few = take(inputs, first)
    if all(torch.equal(t, t[:1].expand_as(t)) for t in tensors(few)):
        few = apply(_unequal, few)  # equal samples show no order
    return [take(few, slice(0, 1)), few, apply(lambda t: t.flip(0), few)]


def _unequal(samples: Tensor) -> Tensor:
    """Return samples of which each is a little smaller than the one before; tokens cannot be made up."""
    if not samples.is_floating_point():
        return samples
    share = torch.arange(len(samples), device=samples.device).view(-1, *[1] * (samples.dim() - 1)) / 8
    return torch.where(samples == 0, share, samples * (1 - share)).to(samples)
