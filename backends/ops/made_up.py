"""Batches that are made up of a few samples: what these do to each other may not show in what they are."""

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from backends.batch import Batch, apply, tensors
from backends.ops.few import Sample

Kind = Literal["other", "alike", "almost", "outlier"]

FAR = 8, 1024
"""Times as large numbers as they were: of another sample, and of an outlier."""

ALMOST = 63 / 64
"""Times its neighbour that a sample is which shall be near it, and not the same."""


def with_another(
    batch: Sample, place: int, inputs: Batch, kind: Kind, only: Collection[int] | None = None
) -> tuple[Sample, Tensor]:
    """Return a batch with another sample in a place, and which [N] are as they were.

    An "other" one has larger numbers, of the other sign, and tokens, lengths, masks and a class of a sample of the
    whole batch that differs, or smaller ones. One that is "alike" has its neighbour's, but for the numbers; one that is
    so "almost" has nearly these too. An "outlier" has numbers so large that they may reach a bound which all share, of
    a norm, say, that is not reached yet. If `only` is given, its other inputs are as they were.
    """
    few, targets = batch
    neighbour, alike = place + 1 if place == 0 else place - 1, kind in ("alike", "almost")

    def changed(t: Tensor, index: int, whole: Tensor) -> Tensor:
        if only is not None and index not in only:
            return t
        t, differs = t.clone(), (whole != t[place]).reshape(len(whole), -1).any(1)
        if t.is_complex():
            t[place] = _far(t[place], FAR[kind == "outlier"])
        else:
            other = t[neighbour] if alike else whole[differs.int().argmax()] if differs.any() else _less(t[place])
            if t.is_floating_point():
                changed_to = (
                    other * ALMOST if kind == "almost" else _far_within(t[place], whole, FAR[kind == "outlier"])
                )
                other = torch.where(_integers(whole), other, changed_to)
            t[place] = other
        return t

    kept = torch.ones(len(targets), dtype=torch.bool, device=targets.device)
    kept[place] = False
    changes, targets = enumerate(tensors(inputs)), targets.clone()
    targets[place] = targets[neighbour] if alike or targets.is_floating_point() else _less(targets[place])
    return (apply(lambda t: changed(t, *next(changes)), few), targets), kept


def _far(t: Tensor, times: int) -> Tensor:
    return t * -times - 1


def _far_within(t: Tensor, whole: Tensor, times: int) -> Tensor:
    """Return larger numbers of the other sign; in [0, 1], if the whole batch is, the least or the largest that occurs.

    A model may use them as probabilities, and on CUDA what is out of bounds ends the process.
    """
    low, high = whole.min(), whole.max()
    bounded = bool(low >= 0) and bool(high <= 1)
    return torch.where(t < (low + high) / 2, high, low) if bounded else _far(t, times)


def _integers(whole: Tensor) -> Tensor:
    """Return where the whole batch has integers: a model may use them as an index, which stays one."""
    return (whole == whole.round()).all(0)


def _less(t: Tensor) -> Tensor:
    """Return a smaller number (a length, a class), or a mask with less in it: where all samples have the same."""
    if t.dim() == 0:
        return t if t.dtype == torch.bool else t - (t > 1).to(t.dtype)
    t = t.clone()
    t.flatten()[-1:].zero_()
    return t


def scaled(batch: Sample, inputs: Batch, targets: Tensor) -> Sample:
    """Return a batch whose samples' numbers are 1, 1/2, 1/4, … times what they were: their largest is one sample's own.

    What is 0 throughout the whole batch becomes 1/2, 1/4, … instead. An index stays one, a probability too.

    Args:
        batch: A few samples.
        inputs: The whole batch.
        targets: Its targets.
    """

    def of(t: Tensor, whole: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        share = 2.0 ** -torch.arange(len(t), device=t.device, dtype=t.dtype).view(-1, *[1] * (t.dim() - 1))
        constant = (whole == whole[0]).all(0)
        smaller = torch.where(_integers(whole) & ~constant, (t * share).floor(), t * share)
        return torch.where(constant & (whole[0] == 0), share / 2, smaller)

    few, wholes = batch[0], iter(tensors(inputs))
    return apply(lambda t: of(t, next(wholes)), few), of(batch[1], targets)
