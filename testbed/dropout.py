"""Dropout with given masks: the same problem, with its randomness turned into inputs.

A random model has no repeatable gradient to compare. `with_masks` draws every dropout mask once and makes it an input
of the batch, so that each sample keeps its own mask whichever backend runs it, in whatever order.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from backends.batch import Batch, call, size
from backends.running import seeded
from testbed.problems import Problem

PLAIN = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # these multiply by a mask and nothing else
MASK = "dropout_mask_{}"


class MaskedDropout(nn.Module):
    """Multiplies by the next of the masks it was given for this call."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return the input [N, ...] times its mask [N, ...]."""
        mask = self.masks.pop(0)
        return x * mask


def random_dropouts(model: nn.Module) -> list[str]:
    """Return the paths of the dropout modules that are active and can be given masks."""
    return [path for path, m in model.named_modules() if isinstance(m, PLAIN) and m.training and m.p > 0]


def with_masks(problem: Problem, seed: int = 0) -> Problem:
    """Return the problem with the masks of its dropout modules as further inputs, for both batches.

    Masks are what the dropout modules themselves return for ones while the model runs once. A mask that does not
    have the samples on its first axis cannot belong to a batch; such a problem stays random and is refused as that.
    """
    order, masks = _unzipped(_draw(problem.model, problem.inputs, seed))
    fresh_order, fresh_masks = _unzipped(_draw(problem.model, problem.fresh_inputs, seed + 1))
    n, fresh_n = problem.n, size(problem.fresh_inputs)
    if order != fresh_order or any(len(m) != n for m in masks) or any(len(m) != fresh_n for m in fresh_masks):
        return problem
    model = copy.deepcopy(problem.model)
    for path in random_dropouts(model):
        model.set_submodule(path, MaskedDropout())
    model.register_forward_pre_hook(_Strip(order), with_kwargs=True)
    return replace(
        problem,
        model=model,
        inputs=_extended(problem.inputs, masks),
        fresh_inputs=_extended(problem.fresh_inputs, fresh_masks),
    )


class _Strip:
    """A forward pre-hook that takes the masks off the inputs and hands them to the dropout modules, in their order.

    It holds paths, not modules: a copy of the model has copies of its hooks.
    """

    def __init__(self, order: tuple[str, ...]) -> None:
        self.order = order

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            args, masks = args[: -len(self.order)], args[-len(self.order) :]
        else:
            masks = tuple(kwargs.pop(MASK.format(i)) for i in range(len(self.order)))
        for path in self.order:
            model.get_submodule(path).masks = []  # type: ignore[assignment]  # a list, which is no tensor or module
        for path, mask in zip(self.order, masks, strict=True):
            model.get_submodule(path).masks.append(mask)  # type: ignore[union-attr, operator]
        return args, kwargs


class _Drawing(nn.Module):
    """Stands for a dropout module: draws its mask by running it on ones, and writes the mask down."""

    def __init__(self, dropout: nn.Module, path: str, drawn: list[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.dropout, self.path, self.drawn = dropout, path, drawn

    def forward(self, x: Tensor) -> Tensor:
        mask: Tensor = self.dropout(torch.ones_like(x))
        self.drawn.append((self.path, mask))
        return x * mask


def _draw(model: nn.Module, inputs: Batch, seed: int) -> list[tuple[str, Tensor]]:
    """Return path and mask of each call of a dropout module, in the order of the calls."""
    model = copy.deepcopy(model)
    drawn: list[tuple[str, Tensor]] = []
    for path in random_dropouts(model):
        model.set_submodule(path, _Drawing(model.get_submodule(path), path, drawn))
    with seeded(model, seed), torch.no_grad():
        call(model, inputs)
    return drawn


def _unzipped(drawn: list[tuple[str, Tensor]]) -> tuple[tuple[str, ...], list[Tensor]]:
    return tuple(path for path, _ in drawn), [mask for _, mask in drawn]


def _extended(inputs: Batch, masks: list[Tensor]) -> Batch:
    if isinstance(inputs, dict):
        return {**inputs, **{MASK.format(i): mask for i, mask in enumerate(masks)}}
    return (*((inputs,) if isinstance(inputs, Tensor) else inputs), *masks)
