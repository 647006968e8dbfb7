"""Rules for `torch.einsum` with a parameter as one of two operands: projections to heads, biases by relative place."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from string import ascii_letters
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backends.ops.outer import Outer
from backends.ops.persample import Dense, Empty, PerSample, fresh
from backends.ops.rules import Pieces, rule


class _Terms(NamedTuple):
    """The letters of an equation `input,weight->output`, and one that is in none of them."""

    input: str
    weight: str
    output: str
    free: str


def _terms(equation: object, input: object, weight: object) -> _Terms | None:
    """Return the letters; None where they do not say enough, or something else than letters."""
    if not isinstance(equation, str) or not isinstance(input, Tensor) or not isinstance(weight, Tensor):
        return None
    operands, arrow, output = equation.replace(" ", "").partition("->")
    first, comma, second = operands.partition(",")
    free = [letter for letter in ascii_letters if letter not in equation]
    more = "".join(free[1 : 1 + max(0, input.dim() - len(first.replace("...", "")))])
    terms = _Terms(first.replace("...", more), second, output.replace("...", more), free[0])
    if not (arrow and comma and input.dim() == len(terms.input) and weight.dim() == len(second)):
        return None
    plain = all(len(set(t)) == len(t) and (t.isalpha() or not t) for t in terms)
    return terms if plain and set(second) <= set(terms.input + terms.output) else None


def _swapped(args: Sequence[Any]) -> Sequence[Any]:
    """Return the arguments with the operands in the other order."""
    equation, *operands = args
    if not isinstance(equation, str) or len(operands) != 2:
        return args
    terms, arrow, output = equation.partition("->")
    return [",".join(terms.split(",")[::-1]) + arrow + output, *operands[::-1]]


@dataclass
class _Reshaped(PerSample):
    """Gradients of a matrix that is a parameter of another shape."""

    of: PerSample
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.samples, self.like = self.of.samples, self.of.like

    def held(self) -> int:
        return self.of.held()

    def rows(self, some: slice) -> Tensor:
        return self.of.rows(some).reshape(-1, *self.shape)

    def squares(self) -> Tensor:
        return self.of.squares()

    def weighted(self, factors: Tensor, empty: Empty = fresh) -> Tensor:
        return self.of.weighted(factors, empty).reshape(self.shape)

    def variance(self) -> Tensor:
        return self.of.variance().reshape(self.shape)

    def gram(self) -> Tensor:
        return self.of.gram()


def _as_matrix(terms: _Terms, g: Tensor, input: Tensor, weight: Tensor) -> PerSample | None:
    """Return the gradients as outer products, where the weight is a matrix from some letters to others."""
    before = [letter for letter in terms.weight if letter not in terms.output]
    after = [letter for letter in terms.weight if letter not in terms.input]
    rest = [letter for letter in terms.input if letter not in before]
    orders = "".join(before + after), "".join(after + before)
    if not terms.weight or terms.weight not in orders or not set(rest) <= set(terms.output) - set(terms.weight):
        return None

    def vectors(t: Tensor, letters: str, wanted: list[str]) -> Tensor:
        axes = [1 + letters.index(letter) for letter in [*rest, *wanted]]
        moved = t.permute(0, *axes)
        return moved.reshape(len(t), prod(moved.shape[1 : 1 + len(rest)]), -1)

    pair = vectors(input, terms.input, before), vectors(g, terms.output, after)
    outer, shape = Outer(*(pair if terms.weight[0] in before else pair[::-1])), tuple(weight.shape)
    return outer if outer.shape == shape else _Reshaped(outer, shape)


@rule(
    torch.einsum,
    covers=lambda a: _terms(a["equation"], a["input"], a["weight"]) is not None,
    commutes=_swapped,
)
def einsum(g: Tensor, equation: str, input: Tensor, weight: Tensor) -> Pieces:
    """Return the rule for y = Σ x w over the letters that are not in y."""
    terms = _terms(equation, input[0], weight)
    assert terms is not None
    found = _as_matrix(terms, g, input, weight)
    if found is None:
        x, w, y, n = terms
        found = Dense(torch.einsum(f"{n}{x},{n}{y}->{n}{w}", input, g))
    return {"weight": found}
