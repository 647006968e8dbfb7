"""A few samples of a batch, and what is found for each."""

from collections.abc import Mapping

import torch
from torch import Tensor

from backends.base import Named
from backends.batch import Batch, apply, take
from backends.ops.persample import PerSample

Sample = tuple[Batch, Tensor]
"""Inputs and targets of one sample, or of a few."""


def alone(batch: Sample, i: int) -> Sample:
    """Return a sample as a batch of its own."""
    return take(batch[0], slice(i, i + 1)), batch[1][i : i + 1]


def copied(batch: Sample) -> Sample:
    """Return a copy: a model may change its inputs in place."""
    inputs, targets = batch
    return apply(torch.clone, inputs), targets.clone()


def row(found: Mapping[str, PerSample], i: int) -> Named:
    """Return a sample's gradients {name: [*shape]}."""
    return {name: g.rows(slice(i, i + 1))[0] for name, g in found.items()}
