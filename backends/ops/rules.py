"""The registry of what is known of ops: rules for those that have parameters, and ops to put in place of others.

A rule is one function, from the gradient of an op's output and the op's own arguments to per-sample gradients:

    @rule(F.linear)
    def linear(g, input, weight, bias=None):
        return {"weight": Outer(vectors(g), vectors(input)), "bias": Dense(vectors(g).sum(1))}
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from backends.ops.persample import PerSample

Op: TypeAlias = Callable[..., Any]
F = TypeVar("F", bound=Op)

Pieces: TypeAlias = Mapping[str, PerSample]
"""The per-sample gradients by one use, by role."""

ROLES = ("weight", "bias")


@dataclass(frozen=True)
class Rule:
    """What is known of an op that has parameters.

    Attributes:
        gradients: (gradient of the output [N, ...], the op's arguments by name) -> g_i by role. Of the arguments,
            `input` is [N, ...], those in a role are the parameters themselves, the others as they were.
        signature: The op's.
        covers: Whether the rule holds for these arguments.
    """

    gradients: Callable[..., Pieces]
    signature: inspect.Signature
    covers: Callable[[Mapping[str, Any]], bool]

    def bind(self, args: Any, kwargs: Any) -> inspect.BoundArguments | None:  # noqa: ANN401  an op's
        """Return the op's arguments by name, or None where the rule does not hold for them."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError:  # some ops have more than one signature
            return None
        bound.apply_defaults()
        return bound if self.covers(bound.arguments) else None


RULES: dict[Op, Rule] = {}
REWRITES: dict[Op, tuple[Op, bool]] = {}

CHOSEN: dict[str, str] = {}
"""What has been chosen in this process by measuring and trying, by what it was chosen for; records show it."""


def rule(*ops: Op, covers: Callable[[Mapping[str, Any]], bool] = lambda arguments: True) -> Callable[[F], F]:
    """Return the decorator that makes a function the rule of some ops.

    Args:
        ops: The ops, as a `TorchFunctionMode` sees them.
        covers: Whether the rule holds for the op's arguments; elsewhere autograd differentiates, sample by sample.
    """

    def decorate(gradients: F) -> F:
        signature = inspect.signature(gradients)
        signature = signature.replace(parameters=[p for name, p in signature.parameters.items() if name != "g"])
        RULES.update(dict.fromkeys(ops, Rule(gradients, signature, covers)))
        return gradients

    return decorate


def rewrite(*ops: Op, watched: bool = True) -> Callable[[F], F]:
    """Return the decorator that makes a function run in place of some ops; where it returns NotImplemented, they run.

    Args:
        ops: The ops, as a `TorchFunctionMode` sees them.
        watched: Whether the ops that the function calls are watched in turn, so that rules apply to them. A function
            that is not is there for vmap's sake, and does not run in a pass over the batch.
    """

    def decorate(function: F) -> F:
        REWRITES.update(dict.fromkeys(ops, (function, watched)))
        return function

    return decorate
