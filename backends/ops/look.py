"""Which ways to run both passes are right for a model: each is held against plain autograd on a few samples.

A pass over the batch shall be right for other samples too. So none of the few may change what another one shows, nor be
put in an order by values; values may be asked for, or how many there are of something, only where vmap has answered,
which knows whose they are; and at each place gradients must have told samples apart.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from backends import precision
from backends.base import Named
from backends.batch import Batch, apply, size, take, tensors
from backends.ops.footprint import Footprint, pairs, saved
from backends.ops.persample import PerSample
from backends.ops.places import Layout
from backends.ops.questions import Questions
from backends.precision import rounding
from backends.probe import some, some_targets
from backends.running import kept_buffers
from backends.shortage import lack_of_memory

if TYPE_CHECKING:
    from backends.ops.passes import Passes, Way

SIZES = 3, 4  # samples of the batch that are looked at, in order and backwards

COARSE = 2.0**-10
"""`finfo.eps` of float16; bfloat16's is larger."""

SAME = ((COARSE, 0.1), (2.0**-23, 0.01), (0.0, 1e-6))
"""(roundings of at least this size, how far gradients may be apart, relative to their norm, that are the same but for
rounding and kinks)."""

NOISE = 8
"""Roundings of the whole gradient that one of a parameter may be apart besides: some are zero but for rounding."""

KINKS = 10.0
"""Times as far apart they may be where numbers are made up, which are large: more of a net's ReLUs are near a kink."""

UNTOUCHED = 64
"""Roundings by which what a sample shows may change with another sample: matrices may be multiplied in other blocks."""

UNTOUCHED_COARSELY = 8
"""The same of bfloat16 and float16, of which 64 would hide a lot of another sample."""

Sample = tuple[Batch, Tensor]


class _Candidate(NamedTuple):
    """A way that might be right, and what it found for each batch; a pass over the batch has a layout, and may ask."""

    way: "Way"
    found: list[dict[str, PerSample]]
    layout: Layout | None = None
    asks: bool = False


class Looked(NamedTuple):
    """What is known after a look.

    Attributes:
        ways: Those that are right, the cheapest first.
        sure: Whether the few samples could tell.
        footprint: How much memory both passes hold.
    """

    ways: list["Way"]
    sure: bool
    footprint: Footprint


@precision.without_tf32()  # which hides what a sample shows of others, as other coarse arithmetic does
def looked(passes: "Passes", inputs: Batch, targets: Tensor) -> Looked:
    """Return which ways are right, and what they hold."""
    few = _few(inputs, targets)
    plain = passes.one_by_one(with_rules=False)
    if size(inputs) == 1:
        right, _ = _judged(passes, few, _run(passes, [passes.one_by_one(with_rules=True)], few))
        return Looked([*(c.way for c in right), plain], True, _footprint(passes, few[0], right))
    over = [c for apart in (False, True) if (c := _over_the_batch(passes, few, inputs, apart)) is not None]
    right, prints = _judged(passes, few, [*over, *_run(passes, [passes.under_vmap(with_rules=True)], few)])
    others = [c for c in right if c.layout is None]
    if not others:
        slower = [passes.under_vmap(with_rules=False), passes.one_by_one(with_rules=True)]
        others = _judged(passes, few, _run(passes, slower, few))[0]
    answered = any(c.way.name != plain.name for c in others)  # by vmap
    over = [c for c in right if c.layout is not None and (answered or not c.asks)]
    sure = all(_tells_apart(c.layout, prints, size(inputs)) for c in over if c.layout)
    found = [*(over[:1] if sure else []), *others]
    return Looked([*(c.way for c in found), plain], sure, _footprint(passes, few[0], found))


def _footprint(passes: "Passes", batch: Sample, right: Sequence[_Candidate]) -> Footprint:
    """Return what an ordinary step and the cheapest right way hold; nothing where that cannot be counted."""
    inputs, targets = _copied(_sample(batch, 0))
    there, step = [*passes.model.parameters(), *passes.model.buffers(), *tensors(inputs)], 0
    with going_on():
        step = saved(partial(passes.plain, inputs, targets), there)
    changes = any(t._version for t in tensors(inputs))
    result = sum(p.nbytes for p in passes.values.values())
    return Footprint(step, pairs(right[0].found[-1].values()) if right else 0, result, changes)


def _few(inputs: Batch, targets: Tensor) -> list[Sample]:
    return list(zip(some(inputs, SIZES), some_targets(targets, SIZES), strict=True))[-2:]


def _run(passes: "Passes", ways: Sequence["Way"], few: Sequence[Sample]) -> list[_Candidate]:
    def ran(way: "Way", batch: Sample) -> dict[str, PerSample]:
        with kept_buffers(passes.model):
            return way.run(*_copied(batch), itself)

    found = []
    for way in ways:
        with going_on():
            found.append(_Candidate(way, [ran(way, batch) for batch in few]))
    return found


def _over_the_batch(passes: "Passes", few: Sequence[Sample], inputs: Batch, apart: bool) -> _Candidate | None:
    found = None
    with going_on():
        with Questions() as questions:
            (first, earlier, _), (second, layout, seen) = (passes.looked_at(*_copied(b), apart=apart) for b in few)
        others = (_with_another(few[-1], *how) for how in ((0, inputs, False), (-1, inputs, False), (-1, inputs, True)))
        placed = earlier == layout and not questions.ordered and passes.copies_are_apart(*_copied(few[-1]))
        if placed and not any(_is_touched(passes, other, seen, apart) for other in others):
            found = _Candidate(passes.over_the_batch(layout), [first, second], layout, questions.asked)
    return found


def _is_touched(passes: "Passes", other: tuple[Sample, Tensor], seen: Sequence[Tensor], apart: bool) -> bool:
    """Return whether samples show something else once another one of them is another: at taps, or in gradients.

    That other one is in new company too, so its gradients, and everyone's, are held against those of it alone.
    """
    (batch, kept), found, after = other, dict[str, PerSample](), list[Tensor]()
    with going_on():  # the other one may be out of bounds
        found, _, after = passes.looked_at(*_copied(batch), apart=apart)
    if not all(_same(a, b, kept) for a, b in zip(seen, after, strict=bool(found))):
        return True
    if not found or rounding(next(iter(passes.values.values()))) >= COARSE:
        return False  # far numbers round too far to tell
    for i in range(len(kept)):
        truth: Named = {}
        with going_on():
            truth = passes.plain(*_copied(_sample(batch, i)))
        if truth and not _near(_row(found, i), truth, KINKS):
            return True
    return False


def _judged(
    passes: "Passes", few: Sequence[Sample], candidates: Sequence[_Candidate]
) -> tuple[list[_Candidate], dict[str, list[tuple[float, ...]]]]:
    """Return the candidates that agree with plain autograd; and, of a model that is not random, fingerprints by name.

    Of a random model nothing can be said: ways that run are right, but none of those over the batch.
    """
    first = _sample(few[0], 0)
    if not _near(passes.plain(*_copied(first)), passes.plain(*_copied(first))):
        return [c for c in candidates if c.layout is None], {}
    right = list(candidates)
    prints: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for b, batch in enumerate(few):
        prints.clear()  # those of the last batch are looked at
        for i in range(size(batch[0])):
            truth = passes.plain(*_copied(_sample(batch, i)))
            right = [c for c in right if _near(_row(c.found[b], i), truth)]
            for name, g in truth.items():
                prints[name].append(_fingerprint(g))
    return right, prints


def _sample(batch: Sample, i: int) -> Sample:
    return take(batch[0], slice(i, i + 1)), batch[1][i : i + 1]


def _row(found: dict[str, PerSample], i: int) -> Named:
    return {name: g.rows(slice(i, i + 1))[0] for name, g in found.items()}


@torch.no_grad()
def _near(ours: Named, theirs: Named, slack: float = 1.0) -> bool:
    """Return whether one sample's gradients are the same; where theirs are not finite, nothing is said."""
    eps = rounding(next(iter(theirs.values())))
    share, noise = slack * next(share for least, share in SAME if eps >= least), NOISE * eps
    if any(ours[name].shape != t.shape for name, t in theirs.items()):
        return False
    gaps = torch.stack([(ours[name] - t).norm() for name, t in theirs.items()])
    norms = torch.stack([t.norm() for t in theirs.values()])
    return bool((gaps <= share * norms + noise * norms.norm()).all()) or not bool(norms.isfinite().all())


def _fingerprint(g: Tensor) -> tuple[float, ...]:
    flat = g.flatten().to(torch.promote_types(g.dtype, torch.float32))
    return tuple(torch.stack([flat.norm(), flat.sum(), flat[::3].sum()]).tolist())


def _tells_apart(layout: Layout, prints: dict[str, list[tuple[float, ...]]], n: int) -> bool:
    """Return whether at each tap some parameter has a gradient of its own for each sample."""
    once = min(n, max(SIZES))  # a smaller batch is looked at with samples again
    different = {name: all(a != b for a, b in combinations(p[:once], 2)) for name, p in prints.items()}
    return all(any(different[name] for name in names) for names in layout.names)


def _same(before: Tensor, after: Tensor, kept: Tensor) -> bool:
    """Return whether the kept samples show the same at a tap [N, ...]."""
    if before.shape != after.shape:
        return False
    wide = torch.promote_types(before.dtype, torch.float32)
    a, b = (t[kept].flatten(1).to(wide).nan_to_num() for t in (before, after))
    return bool(((a - b).norm(dim=1) <= _untouched(before) * a.norm(dim=1)).all())


def _untouched(like: Tensor) -> float:
    """Return how much of itself a tensor may change by when it is the same: autocast leaves tensors in their dtypes."""
    eps = torch.finfo(like.dtype).eps if like.is_floating_point() else 0.0
    return (UNTOUCHED_COARSELY if eps >= COARSE else UNTOUCHED) * eps


def _with_another(batch: Sample, place: int, inputs: Batch, alike: bool) -> tuple[Sample, Tensor]:
    """Return a batch with another sample in a place, and which [N] are as they were.

    It has larger numbers, of the other sign. Its tokens, lengths, masks and class are its neighbour's, if it shall be
    alike, else those of a sample of the whole batch that differs, or smaller ones.
    """
    few, targets = batch
    neighbour = place + 1 if place == 0 else place - 1

    def changed(t: Tensor, whole: Tensor) -> Tensor:
        t, differs = t.clone(), (whole != t[place]).reshape(len(whole), -1).any(1)
        if t.is_complex():
            t[place] = _far(t[place])
        else:
            other = t[neighbour] if alike else whole[differs.int().argmax()] if differs.any() else _less(t[place])
            t[place] = _far_within(t[place], other, whole) if t.is_floating_point() else other
        return t

    kept = torch.ones(len(targets), dtype=torch.bool, device=targets.device)
    kept[place] = False
    changes, targets = iter(tensors(inputs)), targets.clone()
    targets[place] = targets[neighbour] if alike or targets.is_floating_point() else _less(targets[place])
    return (apply(lambda t: changed(t, next(changes)), few), targets), kept


def _far(t: Tensor) -> Tensor:
    return t * -8 - 1


def _far_within(t: Tensor, other: Tensor, whole: Tensor) -> Tensor:
    """Return larger numbers of the other sign; but what looks like an index stays one, and a probability too.

    A model may use them as such, and on CUDA what is out of bounds there ends the process. So where the whole batch has
    integers, they become those of another sample; where it lies in [0, 1], the least or the largest that occurs.
    """
    low, high = whole.min(), whole.max()
    bounded = bool(low >= 0) and bool(high <= 1)
    far = torch.where(t < (low + high) / 2, high, low) if bounded else _far(t)
    return torch.where((whole == whole.round()).all(0), other, far)


def _less(t: Tensor) -> Tensor:
    """Return a smaller number (a length, a class), or a mask with less in it: where all samples have the same."""
    if t.dim() == 0:
        return t if t.dtype == torch.bool else t - (t > 1).to(t.dtype)
    t = t.clone()
    t.flatten()[-1:].zero_()
    return t


def _copied(batch: Sample) -> Sample:
    """Return a copy: a model may change its inputs in place."""
    inputs, targets = batch
    return apply(torch.clone, inputs), targets.clone()


def itself(name: str, g: PerSample) -> PerSample:
    """Return what is wanted of a parameter's gradients where they are looked at: all."""
    return g


@contextmanager
def going_on(there_is_more: bool = True) -> Iterator[None]:
    """Go on after the block when it fails, unless that is for want of memory, or there is nothing more to try."""
    try:
        yield
    except Exception as error:  # whatever a model's code may raise
        if lack_of_memory(error) or not there_is_more:
            raise
