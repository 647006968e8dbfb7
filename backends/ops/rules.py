"""The registry of what is known of ops: rules for those that have parameters, and ops to put in place of others.

A rule is one function, from the gradient of an op's output and the op's own arguments to per-sample gradients:

    @rule(F.linear)
    def linear(g, input, weight, bias=None):
        return {"weight": Outer(vectors(g), vectors(input)), "bias": Dense(vectors(g).sum(1))}
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, TypeVar

from backends.ops.persample import PerSample

Op: TypeAlias = Callable[..., Any]
F = TypeVar("F", bound=Op)

Pieces: TypeAlias = Mapping[str, PerSample]
"""The per-sample gradients by one use, by role."""

ROLES = ("weight", "bias")


class Bound(NamedTuple):
    """An op's arguments.

    Attributes:
        arguments: By name, defaults among them.
        positional: How many of them are given by position; the others by keyword.
    """

    arguments: dict[str, Any]
    positional: int

    def call(self, op: Op) -> Any:  # noqa: ANN401  whatever the op returns
        """Return what the op returns."""
        if self.positional >= len(self.arguments):
            return op(*self.arguments.values())
        named = list(self.arguments.items())
        return op(*(value for _, value in named[: self.positional]), **dict(named[self.positional :]))


@dataclass(frozen=True)
class Rule:
    """What is known of an op that has parameters.

    Attributes:
        gradients: (gradient of the output [N, ...], the op's arguments by name) -> g_i by role. Of the arguments,
            `input` is [N, ...], those in a role are the parameters themselves, the others as they were.
        names: Of the op's arguments.
        positional: How many of them may be given by position.
        defaults: Of those that have one.
        covers: Whether the rule holds for these arguments, with the parameters themselves in their roles.
        folds: Whether the op multiplies vectors [..., d] as one matrix, which torch does for contiguous ones only where
            the weight needs no gradient; others it multiplies by a copy of the weight for each of the first axis.
        commutes: The op's arguments with those two that may change places in the other order; the last one may be a
            parameter.
    """

    gradients: Callable[..., Pieces]
    names: tuple[str, ...]
    positional: int
    defaults: Mapping[str, Any]
    covers: Callable[[Mapping[str, Any]], bool]
    folds: bool = False
    commutes: Callable[[Sequence[Any]], Sequence[Any]] | None = None

    @cached_property
    def known(self) -> frozenset[str]:
        """The names, as a set."""
        return frozenset(self.names)

    @classmethod
    def of(cls, gradients: Callable[..., Pieces], **known: Any) -> "Rule":  # noqa: ANN401  see `rule`
        """Return the rule of a function, whose arguments but the first, g, are the op's."""
        _, *parameters = inspect.signature(gradients).parameters.values()
        names = tuple(p.name for p in parameters)
        positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return cls(gradients, names, positional, defaults, **known)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Bound | None:
        """Return the op's arguments, or None where the rule does not know them; `inspect` takes twice as long."""
        if len(args) == len(self.names) <= self.positional and not kwargs:
            return Bound(dict(zip(self.names, args, strict=True)), self.positional)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if len(args) > self.positional or len(given) < len(args) + len(kwargs) or not given.keys() <= self.known:
            return None  # some ops have more than one signature
        found = {**self.defaults, **given}
        if len(found) < len(self.names):
            return None
        return Bound({name: found[name] for name in self.names}, self.positional)


class Rewrite(NamedTuple):
    """What runs in place of an op; where it returns NotImplemented, the op does.

    Attributes:
        function: With the op's signature.
        watched: Whether the ops that it calls are watched in turn, so that rules apply to them.
    """

    function: Op
    watched: bool


RULES: dict[Op, Rule] = {}
UNDER_VMAP: dict[Op, Rewrite] = {}
OVER_THE_BATCH: dict[Op, Rewrite] = {}


def rule(
    *ops: Op,
    covers: Callable[[Mapping[str, Any]], bool] = lambda arguments: True,
    folds: bool = False,
    commutes: Callable[[Sequence[Any]], Sequence[Any]] | None = None,
) -> Callable[[F], F]:
    """Return the decorator that makes a function the rule of some ops.

    Args:
        ops: The ops, as a `TorchFunctionMode` sees them.
        covers: Whether the rule holds for the op's arguments; elsewhere autograd differentiates, sample by sample.
        folds: See `Rule`.
        commutes: See `Rule`.
    """

    def decorate(gradients: F) -> F:
        RULES.update(dict.fromkeys(ops, Rule.of(gradients, covers=covers, folds=folds, commutes=commutes)))
        return gradients

    return decorate


def rewrite(
    *ops: Op, watched: bool = True, passes: Sequence[dict[Op, Rewrite]] = (UNDER_VMAP, OVER_THE_BATCH)
) -> Callable[[F], F]:
    """Return the decorator that makes a function run in place of some ops.

    Args:
        ops: The ops, as a `TorchFunctionMode` sees them.
        watched: See `Rewrite`.
        passes: In which passes.
    """

    def decorate(function: F) -> F:
        for rewrites in passes:
            rewrites.update(dict.fromkeys(ops, Rewrite(function, watched)))
        return function

    return decorate
