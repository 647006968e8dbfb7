"""How a model uses its parameters: seen by running a plain copy of it, without any library, on a few of its samples.

A library that computes per-sample gradients from what goes into a layer and what comes back takes row i of both for
sample i. `uses` finds out whether that is so: it sends a gradient into the outputs of one sample and looks which rows
of each watched call it reaches. That sees what no shape shows: samples that are reordered inside the model, a batch on
another axis of equal length, one result that is broadcast over the batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from backends.base import describe, trainable
from backends.batch import Batch, apply, call, size, take, tensors
from backends.rows import Rows, RowsOf, batch_first, tensors_in
from backends.running import kept_buffers

SIZES = 4, 3  # forwards and backwards: two, since rolling by three samples, say, moves four but not three


@dataclass(frozen=True)
class Hooked:
    """A module that a library hooks.

    Attributes:
        module: The module.
        deep: Its rule covers the parameters of its children too.
        reruns: Its rule runs the module anew, on the one tensor that went in.
        several: Its rule sees all tensors that go in and come out, by position or keyword, not one of each.
    """

    module: nn.Module
    deep: bool = False
    reruns: bool = False
    several: bool = False

    def covered(self) -> set[int]:
        """Return the identities of the parameters that the rule covers."""
        return {id(p) for p in self.module.parameters(recurse=self.deep)}


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
        altered: What was not the module's own: "input" or "output" that the caller's hooks changed, "weights"; and
            "buffers" that the call has changed.
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


_State: TypeAlias = list[tuple[int, int]]
"""Of some tensors, what tells whether one was replaced or changed in place."""


@dataclass
class _Call:
    """A module's call that is going on: its input before and after the caller's hooks, its output before them."""

    path: str
    given: _State
    buffers: _State
    taken: _State = field(default_factory=list)
    made: _State = field(default_factory=list)


@dataclass
class _Watch(TorchFunctionMode):
    """Records the calls of hooked modules, and differentiable uses of parameters outside of them."""

    hooked: Mapping[str, Hooked]
    names: Mapping[int, str]
    samples: int
    sample: int
    rows_of: RowsOf
    uses: list[Use] = field(default_factory=list)
    inside: list["_Call"] = field(default_factory=list)
    backward: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.covered = {path: h.covered() for path, h in self.hooked.items()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs: first and last of each module's hooks, to see what others do."""
        handles = []
        for path, h in self.hooked.items():
            before, after = h.module.register_forward_pre_hook, h.module.register_forward_hook
            handles += [
                before(
                    lambda m, args, path=path: self.inside.append(_Call(path, _state(args), _state(list(m.buffers())))),
                    prepend=True,
                ),
                before(lambda _, args: setattr(self.inside[-1], "taken", _state(args))),
                after(lambda _, __, output: setattr(self.inside[-1], "made", _state(output)), prepend=True),
                after(self._left, with_kwargs=True, always_call=True),
            ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _left(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ANN401
        call = self.inside.pop()
        covered = self.covered[call.path]
        pairs: dict[str, tuple[object, object]] = {
            "input": (call.given, call.taken),
            "output": (call.made, _state(output)),
            "buffers": (call.buffers, _state(list(module.buffers()))),
            "weights": (covered, self.hooked[call.path].covered()),  # torch.func.functional_call swaps them
        }
        if torch.is_grad_enabled():  # libraries look away where it is not
            rows = batch_first(module, args, output)
            if self.hooked[call.path].several:
                rows = ([Rows(t) for t in tensors_in((args, kwargs))], [Rows(t) for t in tensors_in(output)])
            self._record(
                rows,
                by=describe(call.path, module),
                parameters=tuple(name for p, name in self.names.items() if p in covered),
                hooked=self.hooked[call.path],
                tensors_in=len(tensors_in(args)),
                tensors_out=len(tensors_in(output)),
                keywords=bool(tensors_in(kwargs)),
                altered=frozenset(what for what, (one, two) in pairs.items() if one != two),
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        results = [result] if isinstance(result, Tensor) else tensors_in(result)
        if any(t.requires_grad for t in results):  # not a size, a dtype, something detached
            inside = set().union(*(self.covered[call.path] for call in self.inside))
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
                    tensors_out=len(results),
                )
        return result

    def _record(self, rows: tuple[list[Rows], list[Rows]], **about: Any) -> None:  # noqa: ANN401
        if self.backward and set(about["parameters"]) <= {name for use in self.uses for name in use.parameters}:
            return  # a checkpoint that runs again what has been seen; one that hid it from autograd is seen only now
        counts = tuple(r.count() for r in rows[0] + rows[1])
        use = Use(samples=self.samples, sample=self.sample, counts=counts, **about)
        self.uses.append(use)

        def look(grad: Tensor | None, where: Rows) -> None:
            if grad is None:  # of several results, those that were not used may have none
                return
            if self.backward:
                use.strays += [i for i in where.reached(grad) if i != self.sample]
            else:
                use.differentiated = True

        for where in rows[1]:
            if where.tensor.requires_grad:
                where.tensor.register_hook(lambda grad, where=where: look(grad, where))


def _state(tree: Any) -> _State:  # noqa: ANN401
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


def some(inputs: Batch, sizes: tuple[int, int] = SIZES) -> list[Batch]:
    """Return small batches that show what a model does with its samples: one, and a few, in order and backwards.

    Backwards too, because a model that sorts its samples leaves one of the two as it is. One sample alone has no order.
    """
    if size(inputs) == 1:
        return [inputs]
    few = take(inputs, spread(size(inputs), max(sizes)))
    if all(torch.equal(t, t[:1].expand_as(t)) for t in tensors(few)):
        few = apply(_unequal, few)  # equal samples show no order
    forwards, backwards = sizes
    return [take(few, slice(0, 1)), take(few, slice(0, forwards)), apply(lambda t: t.flip(0)[:backwards], few)]


def some_targets(targets: Tensor, sizes: tuple[int, int] = SIZES) -> list[Tensor]:
    """Return the targets of the batches that `some` returns."""
    if len(targets) == 1:
        return [targets]
    few = targets[spread(len(targets), max(sizes))]
    return [few[:1], few[: sizes[0]], few.flip(0)[: sizes[1]]]


def spread(n: int, most: int) -> Tensor:
    """Return which of N samples are looked at, from the first to the last; a sample again where there are too few."""
    few = torch.arange(most, device="cpu")  # whatever the default device is
    return few * (n - 1) // (most - 1) if n > most else few % n


def _unequal(samples: Tensor) -> Tensor:
    """Return samples of which each is a little smaller than the one before; tokens cannot be made up."""
    if not samples.is_floating_point():
        return samples
    share = torch.arange(len(samples), device=samples.device).view(-1, *[1] * (samples.dim() - 1)) / 8
    return torch.where(samples == 0, share, samples * (1 - share)).to(samples)
