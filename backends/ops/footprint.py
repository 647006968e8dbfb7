"""How much memory is held of a sample until the backward pass is over: in an ordinary step, and as pairs."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from backends.heap import KEPT
from backends.ops.persample import PerSample

MOST = 1.25
"""Times what an ordinary step holds that may be held: its peak is higher, and 1.3 times that is what is allowed."""

EXTRA = 4
"""A quarter of the pairs may be held besides: where they are few, other things are held when most of them are."""

FREE = KEPT
"""Bytes that may be held in any case: a process on a CPU keeps as much of what it has freed.

With PyTorch it takes eight times as much from the start, so that its peak stays within the bound.
"""


class Footprint(NamedTuple):
    """Bytes of one sample, and whether it is left as it was.

    Attributes:
        step: What an ordinary forward pass saves for the backward pass.
        pairs: What all pairs take, or gradients where they take less.
        result: What a gradient of all parameters takes.
        changes: Whether the model changes its inputs in place.
    """

    step: int
    pairs: int
    result: int = 0
    changes: bool = False

    def spare(self, samples: int, whole: int) -> int:
        """Return how many bytes some samples may hold besides pairs.

        A part of a whole batch may also hold what the other samples would, but for two sums that are added.
        """
        share = samples * min(int(MOST * self.step) - self.pairs, self.pairs // EXTRA)
        others = int(MOST * self.step) * (whole - samples) - 2 * self.result
        return max(0, share, share + others, FREE - samples * max(self.step, self.pairs) if self.step else 0)


NOTHING = Footprint(0, 0)


def saved(call: Callable[[], object], there: Iterable[Tensor]) -> int:
    """Return how many bytes a call's forward pass saves for its backward pass, besides the memory that was there."""
    known = {t.untyped_storage().data_ptr() for t in there}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        memory = t.untyped_storage()
        if memory.data_ptr() not in known:
            found[memory.data_ptr()] = memory.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(found.values())


def pairs(found: Iterable[PerSample]) -> int:
    """Return how many bytes of a sample the gradients of all parameters take, in the smaller form."""
    return sum(min(g.held() or g.bytes(), g.bytes()) // g.samples for g in found)
