"""What float16 cannot hold, whose largest number is 65504, and which has few near 0."""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from backends.ops.made import Through
from backends.ops.persample import Dense, PerSample, fresh


def without_float16(g: PerSample) -> PerSample:
    """Return the same in float32, where it is in float16: squares and products of gradients may be beyond that."""
    if g.like.dtype != torch.float16:
        return g

    if isinstance(g, Through):  # a graph leads from what is made to its parameter, in their own dtypes
        return Dense(g.grads(fresh).float())

    def wider(value: Any) -> Any:  # noqa: ANN401  of an attribute
        if isinstance(value, PerSample):
            return without_float16(value)
        if isinstance(value, list):
            return [wider(part) for part in value]
        return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value

    held = {f.name: wider(getattr(g, f.name)) for f in fields(g)}  # type: ignore[arg-type]  # every form is a dataclass
    return replace(g, **held)  # type: ignore[type-var]


def unit(factors: Tensor, dtypes: Iterable[torch.dtype]) -> Tensor | None:
    """Return what to count clip factors in, if there is float16: with a scaled loss all of them may be near 0."""
    if torch.float16 not in dtypes:
        return None
    return factors.max().clamp(min=torch.finfo(factors.dtype).tiny)
