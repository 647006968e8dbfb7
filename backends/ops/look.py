"""Which ways to run both passes are right for a model: each is held against plain autograd on a few samples.

A pass over the batch shall be right for other samples too. So none of the few may change what another one shows, nor be
put in an order by values; values may be asked for, or how many there are of something, only where vmap has answered,
which knows whose they are; and at each place gradients must have told samples apart.
"""

import pickle
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from math import inf, isfinite
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from backends import precision
from backends.base import Named
from backends.batch import Batch, apply, call, size, take, tensors
from backends.ops.footprint import Footprint, pairs, saved
from backends.ops.made_up import Kind, Sample, scaled, with_another
from backends.ops.near import COARSE, KINKS, KINKS_COARSELY, fingerprint, near, same
from backends.ops.persample import PerSample
from backends.ops.places import Layout
from backends.ops.questions import Questions
from backends.precision import rounding
from backends.probe import some, some_targets
from backends.running import kept_buffers, seeded
from backends.shortage import lack_of_memory

if TYPE_CHECKING:
    from backends.ops.passes import Passes, Way

SIZES = 3, 4  # samples of the batch that are looked at, in order and backwards

OTHERS: tuple[tuple[int, Kind], ...] = ((0, "other"), (-1, "other"), (-1, "alike"), (0, "almost"))
"""Which sample of a few is made another one."""


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
    whole = inputs, targets
    over = [c for apart in (False, True) if (c := _over_the_batch(passes, few, whole, apart)) is not None]
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


@precision.without_tf32()
def holds(passes: "Passes", way: "Way", inputs: Batch, targets: Tensor) -> bool:
    """Return whether a way finds what plain autograd does for some samples of a whole batch, as far as memory allows.

    A few samples do not show what begins with more of them: a capacity, a share that is dropped, a rare outlier. So the
    samples of the least and the largest loss are looked at, and the last one.
    """
    n = size(inputs)
    try:
        with kept_buffers(passes.model):
            losses = passes.loss_fn(call(passes.model, apply(torch.clone, inputs)), targets.clone()).detach()
        some = sorted({int(losses.argmin()), int(losses.argmax()), n - 1})
        with kept_buffers(passes.model):
            found = way.run(
                *_copied((inputs, targets)), lambda _, g: [g.rows(slice(i, i + 1))[0].clone() for i in some]
            )
        truths = (passes.plain(*_copied(_sample((inputs, targets), i))) for i in some)
        slack = KINKS if rounding(next(iter(passes.values.values()))) < COARSE else KINKS_COARSELY
        return all(near({name: rows[k] for name, rows in found.items()}, t, slack) for k, t in enumerate(truths))
    except Exception as error:
        if lack_of_memory(error):
            return True
        raise


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


def _over_the_batch(passes: "Passes", few: Sequence[Sample], whole: Sample, apart: bool) -> _Candidate | None:
    found = None
    with going_on():
        with Questions() as questions:
            (first, earlier, _), (second, layout, seen) = (passes.looked_at(*_copied(b), apart=apart) for b in few)
        batch = few[-1]
        others = (with_another(batch, place, whole[0], kind) for place, kind in OTHERS)
        placed = earlier == layout and not questions.ordered and passes.copies_are_apart(*_copied(batch))
        if placed and not any(_is_touched(passes, *other, seen, apart) for other in others):
            by_size = scaled(batch, *whole)
            if _are_alone(passes, by_size, _made_up(passes, by_size, apart)[0]):
                found = _Candidate(passes.over_the_batch(layout), [first, second], layout, questions.asked)
    return found


def _is_touched(passes: "Passes", batch: Sample, kept: Tensor, seen: Sequence[Tensor], apart: bool) -> bool:
    """Return whether samples show something else at a tap once another one of them is another.

    That other one is in new company too, so its gradients, and everyone's, are held against those of it alone.
    """
    found, after = _made_up(passes, batch, apart)
    if not all(same(a, b, kept) for a, b in zip(seen, after, strict=bool(found))):
        return True
    return not _are_alone(passes, batch, found)


def _made_up(passes: "Passes", batch: Sample, apart: bool) -> tuple[dict[str, PerSample], list[Tensor]]:
    """Return what a pass over a made-up batch finds, and shows at each tap; nothing where it is out of bounds."""
    found, seen = dict[str, PerSample](), list[Tensor]()
    with going_on():
        found, _, seen = passes.looked_at(*_copied(batch), apart=apart)
    return found, seen


def _are_alone(passes: "Passes", batch: Sample, found: dict[str, PerSample]) -> bool:
    """Return whether the gradients of made-up samples are those that each has alone, if that can be said."""
    if not found or rounding(next(iter(passes.values.values()))) >= COARSE:
        return True  # far numbers round too far to tell
    for i in range(size(batch[0])):
        truth: Named = {}
        with going_on():
            truth = passes.plain(*_copied(_sample(batch, i)))
        if truth and not near(_row(found, i), truth, KINKS):
            return False
    return True


def _judged(
    passes: "Passes", few: Sequence[Sample], candidates: Sequence[_Candidate]
) -> tuple[list[_Candidate], dict[str, list[tuple[float, ...]]]]:
    """Return the candidates that agree with plain autograd; and, of a model that is not random, fingerprints by name.

    Of a random model, ways are right that find the same without rules, of the same random numbers; but none of those
    over the batch.
    """
    if _is_random(passes, _sample(few[0], 0)):
        return [c for c in candidates if c.layout is None and _draws_as_without_rules(passes, c.way, few[-1])], {}
    right = list(candidates)
    prints: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for b, batch in enumerate(few):
        prints.clear()  # those of the last batch are looked at
        for i in range(size(batch[0])):
            truth = passes.plain(*_copied(_sample(batch, i)))
            right = [c for c in right if near(_row(c.found[b], i), truth)]
            for name, g in truth.items():
                prints[name].append(fingerprint(g))
    return right, prints


def _is_random(passes: "Passes", sample: Sample) -> bool:
    """Return whether a model draws, or does not do twice the same."""
    before = _random_states(passes)
    first = passes.plain(*_copied(sample))
    return _random_states(passes) != before or not near(first, passes.plain(*_copied(sample)))


def _random_states(passes: "Passes") -> tuple[object, ...]:
    device = next(iter(passes.values.values())).device
    on_device = [torch.cuda.get_rng_state(device).tolist()] if device.type == "cuda" else []
    return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist(), *on_device


def _draws_as_without_rules(passes: "Passes", way: "Way", batch: Sample) -> bool:
    """Return whether a way finds what it does without rules, of the same random numbers."""
    found: list[dict[str, PerSample]] = []
    without = passes.one_by_one(with_rules=False), passes.under_vmap(with_rules=False)
    for each in (way, next(w for w in without if w.name == way.name)):
        with going_on(), seeded(passes.model, 0), kept_buffers(passes.model):
            found.append(each.run(*_copied(batch), itself))
    return len(found) == 2 and all(near(_row(found[0], i), _row(found[1], i)) for i in range(size(batch[0])))


def _sample(batch: Sample, i: int) -> Sample:
    return take(batch[0], slice(i, i + 1)), batch[1][i : i + 1]


def _row(found: dict[str, PerSample], i: int) -> Named:
    return {name: g.rows(slice(i, i + 1))[0] for name, g in found.items()}


def _tells_apart(layout: Layout, prints: dict[str, list[tuple[float, ...]]], n: int) -> bool:
    """Return whether at each tap some parameter has a gradient of its own for each sample.

    One that is there as [N, ...] must have some gradient for one of those that were in two places, in order and
    backwards: it was the sample's own then, and an index would have taken the same place both times.
    """
    once = min(n, max(SIZES))  # a smaller batch is looked at with samples again
    finite = {name: [f for f in p[:once] if isfinite(sum(f))] for name, p in prints.items()}
    different = {name: len(p) > 1 and all(a != b for a, b in combinations(p, 2)) for name, p in finite.items()}
    there = {name: any(0 < norm < inf for norm, *_ in p[1:]) for name, p in prints.items()}
    return all(any(different[name] for name in names) for names in layout.names) and all(map(there.get, layout.copies))


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
