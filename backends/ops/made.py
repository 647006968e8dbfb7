"""Tensors that are made of parameters alone: 1 + w, a part of w, w standardised. Rules hold for them, as for these."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from backends.ops.persample import PerSample


class Made(NamedTuple):
    """Such a tensor.

    Attributes:
        tensor: It, as autograd knows it.
        of: The parameters it is made of, by name.
    """

    tensor: Tensor
    of: Mapping[str, Tensor]


@dataclass
class Through(PerSample):
    """Gradients of a parameter by a tensor that is made of it: those of that tensor, taken back by autograd.

    Attributes:
        later: Those of the tensor.
        made: The tensor.
        parameter: The parameter.
    """

    later: PerSample
    made: Tensor
    parameter: Tensor

    def __post_init__(self) -> None:
        self.samples, self.shape, self.like = self.later.samples, tuple(self.parameter.shape), self.parameter.detach()

    def held(self) -> int:  # noqa: D102
        return self.later.held() or self.later.bytes()

    def rows(self, some: slice) -> Tensor:  # noqa: D102
        g = self.later.rows(some).to(self.made.dtype)
        (found,) = torch.autograd.grad(self.made, self.parameter, g, retain_graph=True, is_grads_batched=True)
        return found
