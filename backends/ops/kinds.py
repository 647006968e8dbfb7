"""Whether the way of a batch is right for all kinds of its samples, by what each would answer alone."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from backends import precision
from backends.batch import Batch, cast, take
from backends.ops.answers import Answers
from backends.ops.few import Sample, copied, row
from backends.ops.near import COARSE, STRICT, near
from backends.ops.persample import PerSample
from backends.precision import rounding
from backends.running import kept_buffers, seeded

if TYPE_CHECKING:
    from backends.ops.passes import Passes, Way

Again: TypeAlias = Callable[["Passes", Batch, Tensor], dict[str, PerSample]]
"""(passes, inputs, targets) -> what a way finds, whatever the batch answers."""


def with_each_kind(passes: "Passes", whole: Sample, spread: Sequence[int]) -> Sample:
    """Return as many samples as `spread` names, one of each kind first; of as few kinds, they answer as all of them."""
    kinds = {kind: i for i, kind in reversed(list(enumerate(passes.asked(*whole).own)))}
    some = [*dict.fromkeys([*kinds.values(), *spread]), *spread][: len(spread)]
    chosen = torch.tensor(some, device=whole[1].device)
    return take(whole[0], chosen), whole[1][chosen]


def show(passes: "Passes", answers: Answers, few: Sequence[Sample]) -> bool:
    """Return whether a few samples go the batch's way, and are of all its kinds."""
    found = [passes.asked(*batch).answers for batch in few]
    kinds = frozenset(kind for a in found for kind in a.kinds)
    return all(a.values == answers.values for a in found) and kinds == answers.kinds


def right_for_others(passes: "Passes", way: "Way", few: Sequence[Sample]) -> bool:
    """Return whether samples that alone would answer otherwise have the gradients that they have among their like.

    A way that leaves out what makes no difference finds the same but for rounding. That may put ReLUs on the other side
    of their kinks, or be coarse: then it is tried in float64, and what cannot be tried is not right.
    """
    if way.again is None or all(kind == way.answers.values for kind in way.answers.kinds):
        return True
    try:
        if rounding(next(iter(passes.values.values()))) < COARSE and _are_right(passes, way.again, few, STRICT):
            return True
        wide = [(cast(inputs, torch.float64), cast(targets, torch.float64)) for inputs, targets in few]
        with precision.without_autocast(few[0][1].device):
            return _are_right(passes.in_float64(), way.again, wide)
    except Exception:  # of memory, of what has no float64
        return False


def _are_right(passes: "Passes", again: Again, few: Sequence[Sample], slack: float = 1.0) -> bool:
    def found(batch: Sample) -> dict[str, PerSample]:
        with seeded(passes.model, 0), kept_buffers(passes.model):
            return again(passes, *copied(batch))

    for inputs, targets in few:
        asked, ours = passes.asked(inputs, targets), found((inputs, targets))
        for i in (i for i, kind in enumerate(asked.own) if kind != asked.answers.values):
            like = torch.full((len(targets),), i, device=targets.device)
            if not near(row(ours, i), row(found((take(inputs, like), targets[like])), i), slack):
                return False
    return True
