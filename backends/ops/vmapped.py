"""One op under vmap, in a pass over the batch: where it has parameters and samples, and no rule.

A rule takes less time, and where norms are wanted, perhaps less memory. But without this, one op that has none would
put the whole model under vmap. The op runs as it would for each sample alone, as a batch of its own, with parameters
that are there for each sample [N, *shape], which takes no memory (stride 0).
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from backends.ops.persample import Dense
from backends.ops.places import SHARED, WITHOUT, Guess, Place, likely
from backends.ops.taps import Uncovered

if TYPE_CHECKING:
    from backends.ops.recorder import Recorder


class Plan(NamedTuple):
    """How to run an op.

    Attributes:
        func: The op.
        parameters: Which of its arguments, by their order in depth, are parameters or made of them.
        places: Where the samples are in others.
        out: Where they are in what comes out; None where the op runs as it is.
    """

    func: Callable[..., Any]
    parameters: tuple[int, ...]
    places: tuple[tuple[int, Place], ...] = ()
    out: Place | None = None

    def one_row(self) -> bool:
        """Return whether each sample has one entry on its axis."""
        return all(place.rows == 1 for _, place in self.places)


class Call(NamedTuple):
    """An op and its arguments, in depth."""

    func: Callable[..., Any]
    leaves: list[Any]
    form: Any

    @classmethod
    def of(cls, func: Callable[..., Any], args: Any, kwargs: Any) -> "Call":  # noqa: ANN401  as `__torch_function__`
        """Return the call of an op."""
        return cls(func, *tree_flatten((args, kwargs)))

    def tensors(self) -> dict[int, Tensor]:
        """Return the arguments that are tensors."""
        return {k: t for k, t in enumerate(self.leaves) if isinstance(t, Tensor)}

    def on(self, leaves: Sequence[Any]) -> Any:  # noqa: ANN401
        """Return what the op returns for other arguments."""
        args, kwargs = tree_unflatten(leaves, self.form)
        return self.func(*args, **kwargs)

    def under_vmap(self, copies: Mapping[int, Tensor], places: Mapping[int, Place], n: int, out: int) -> Any:  # noqa: ANN401
        """Return what the op returns for each sample, with these on an axis of their own."""
        split = {k: _split(self.leaves[k], n, place) for k, place in places.items()}
        given = {**{k: (t, 0) for k, t in copies.items()}, **split}

        def one(*some: Tensor) -> Any:  # noqa: ANN401
            leaves = list(self.leaves)
            for k, t in zip(given, some, strict=True):
                leaves[k] = t
            return self.on(leaves)

        axes = tuple(axis for _, axis in given.values())
        return vmap(one, axes, out, randomness="different")(*(t for t, _ in given.values()))

    def planned(self, parameters: Mapping[int, Tensor], n: int, guess: Guess, op: int) -> Plan | None:
        """Return how to run the op: as it is, where it changes something in place or returns no tensor of samples.

        Args:
            parameters: Its arguments that are parameters.
            n: N.
            guess: What is guessed of samples' places.
            op: The op's among those whose sizes for another N are known; where they are not, None is returned.
        """
        other, sizes = guess.elsewhere(n, op)
        if other == n:
            return None
        as_it_is, places = Plan(self.func, tuple(parameters)), dict[int, Place]()
        for (k, t), size in zip(self.tensors().items(), sizes, strict=False):
            if k not in parameters and len(size) == t.dim():
                fit = (place for place in likely(t, n, guess, (other, size)) if place.fits(t, t, n))
                place = next(fit, WITHOUT)
                if place not in (WITHOUT, SHARED):
                    places[k] = place
        if not places or self._changes_something():
            return as_it_is
        with torch.no_grad():
            whole = self.on(self.leaves)
            each = self.under_vmap({k: t.expand(n, *t.shape) for k, t in parameters.items()}, places, n, 0)
        if isinstance(whole, Tensor) and isinstance(each, Tensor) and each.dim() == whole.dim() + 1:
            for axis, rows in enumerate(each.shape[1:]):
                if whole.shape == (*each.shape[1 : 1 + axis], n * rows, *each.shape[2 + axis :]):
                    out = Place(axis, rows, next(iter(places.values())).apart)
                    return as_it_is._replace(places=tuple(places.items()), out=out)
        return as_it_is

    def _changes_something(self) -> bool:
        name: str = getattr(self.func, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
        _, kwargs = tree_unflatten(self.leaves, self.form)
        return (
            in_place or kwargs.get("out") is not None or (name.startswith("__i") and hasattr(operator, name.strip("_")))
        )

    def run(self, plan: Plan, copies: Mapping[int, Tensor], n: int) -> Tensor:
        """Return what the op returns, by vmap.

        Args:
            plan: How.
            copies: The parameters [N, *shape].
            n: N.

        Raises:
            Uncovered: The samples are not where they were.
        """
        places, (axis, _, apart) = dict(plan.places), plan.out or WITHOUT
        assert axis is not None
        if not all(_holds(self.leaves[k], n, place) for k, place in places.items()):
            raise Uncovered
        found: Tensor = self.under_vmap(copies, places, n, axis + apart)
        return found.flatten(axis, axis + 1)


class Copies(torch.autograd.Function):
    """A parameter for each sample [N, *shape]; backwards, the recorder takes their gradients."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, values: Tensor, recorder: "Recorder", name: str) -> Tensor:  # noqa: ANN401, D102
        ctx.recorder, ctx.name = recorder, name
        return values.expand(len(token), *values.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, ...]:  # noqa: ANN401, D102
        if not ctx.recorder.forward_is_over:
            raise Uncovered
        ctx.recorder.show(g[:, None])
        ctx.recorder.take(ctx.name, Dense(g))
        return None, None, None, None


def samples_first(t: Tensor, n: int, place: Place) -> Tensor:
    """Return a tensor with the N samples on the first axis [N, ...]."""
    split, axis = _split(t, n, place)
    return split.movedim(axis, 0)


def _holds(t: Any, n: int, place: Place) -> bool:  # noqa: ANN401
    axis = place.axis or 0
    return isinstance(t, Tensor) and axis < t.dim() and t.shape[axis] == n * place.rows


def _split(t: Tensor, n: int, place: Place) -> tuple[Tensor, int]:
    """Return a tensor with the N samples on an axis of their own, before what each has there, and that axis."""
    axis = place.axis or 0
    split: Tensor = t.unflatten(axis, (place.rows, n) if place.apart else (n, place.rows))
    return split, axis + place.apart
