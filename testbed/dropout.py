"""Dropout with given masks: the same problem, with its randomness turned into inputs.

A random model has no repeatable gradient to compare. `with_masks` draws every dropout mask once and makes it an input
of the batch, so that each sample keeps its own mask whichever backend runs it, in whatever order.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from backends.base import full_copy, trainable
from backends.batch import Batch, call, size, take
from backends.running import kept_buffers, seeded
from backends.shortage import lack_of_memory
from testbed.problems import Problem

PLAIN = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # these multiply by a mask and nothing else
MASK = "dropout_mask_{}"


class MaskedDropout(nn.Module):
    """Multiplies by the next of the masks it was given for this call; a checkpoint may ask again for one alone.

    Attributes:
        p: That of the dropout it stands for: a model may read it to drop by itself, which has no mask then.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.masks: list[Tensor] = []
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the input [N, ...] times its mask [N, ...]."""
        mask = self.masks[0 if len(self.masks) == 1 else self.calls]
        self.calls += 1
        return x * mask


def random_dropouts(model: nn.Module) -> list[str]:
    """Return the paths of the dropout modules that are active and can be given masks."""
    return [path for path, m in model.named_modules() if isinstance(m, PLAIN) and m.training and m.p > 0]


def with_masks(problem: Problem, seed: int = 0) -> Problem:
    """Return the problem with the masks of its dropout modules as further inputs, for both batches.

    Masks are what the dropout modules themselves return for ones while the model runs once. A mask that does not
    have the samples on its first axis cannot belong to a batch; such a problem stays random and is refused as that. So
    does one that does not run with masks, or does not run at all, which is for others to say.
    """
    try:
        masked = _with_masks(problem, seed)
        if masked is not None:
            _try(masked)
    except Exception as error:  # whatever a model's code may raise
        if lack_of_memory(error):
            raise
        return problem
    return masked or problem


def _with_masks(problem: Problem, seed: int) -> Problem | None:
    """Return the problem with masks, or None where they are not one for each sample."""
    inputs, fresh = problem.inputs, problem.fresh_inputs
    fewer = take(inputs, slice(0, max(1, problem.n - 1)))  # of which other axes are as long as before
    drawn = [_unzipped(_draw(problem.model, batch, seed + k)) for k, batch in enumerate((inputs, fresh, fewer))]
    orders = {order for order, _ in drawn}
    lengths = [{len(mask) for mask in masks} for _, masks in drawn]
    if len(orders) > 1 or () in orders or lengths != [{size(batch)} for batch in (inputs, fresh, fewer)]:
        return None
    (order, masks), (_, fresh_masks), _ = drawn
    model = full_copy(problem.model)
    for path in random_dropouts(model):
        model.set_submodule(path, MaskedDropout(model.get_submodule(path).p))  # type: ignore[arg-type]
    model.register_forward_pre_hook(_Strip(order), with_kwargs=True)
    return replace(problem, model=model, inputs=_extended(inputs, masks), fresh_inputs=_extended(fresh, fresh_masks))


def _try(problem: Problem) -> None:
    """Run a step: where a checkpoint asks again for several masks, these are in another order, and used up."""
    parameters = list(trainable(problem.model).values())
    with kept_buffers(problem.model), seeded(problem.model, 0), torch.enable_grad():
        loss = problem.loss_fn(call(problem.model, problem.inputs), problem.targets).sum()
        torch.autograd.grad(loss, parameters, allow_unused=True)


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
            dropout = model.get_submodule(path)
            dropout.masks, dropout.calls = [], 0  # type: ignore[assignment]  # which are no tensors or modules
        for path, mask in zip(self.order, masks, strict=True):
            model.get_submodule(path).masks.append(mask)  # type: ignore[union-attr, operator]
        return args, kwargs


class _Drawing(nn.Module):
    """Stands for a dropout module: draws its mask by running it on ones, and writes the mask down."""

    def __init__(self, dropout: nn.Module, path: str, drawn: list[tuple[str, Tensor]]) -> None:
        super().__init__()
        self.dropout, self.path, self.drawn, self.p = dropout, path, drawn, dropout.p

    def forward(self, x: Tensor) -> Tensor:
        mask: Tensor = self.dropout(torch.ones_like(x))
        self.drawn.append((self.path, mask))
        return x * mask


def _draw(model: nn.Module, inputs: Batch, seed: int) -> list[tuple[str, Tensor]]:
    """Return path and mask of each call of a dropout module, in the order of the calls."""
    model = full_copy(model)
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
