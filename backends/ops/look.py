"""Which ways to run both passes are right for a model: each is held against plain autograd on a few samples.

A pass over the batch shall be right for other samples too. So none of the few may change what another one shows, nor be
put in an order by values; values may be asked for, or how many there are of something, only where vmap has answered,
which knows whose they are; nothing but dropout may be drawn; and at each place gradients must have told samples apart.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from math import inf, isfinite
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from backends import precision
from backends.base import Named
from backends.batch import Batch, apply, call, size, tensors
from backends.ops.answers import OtherAnswers
from backends.ops.draws import Draws, draws, draws_as_without_rules, truths, without_dropout
from backends.ops.few import Sample, alone, copied, row
from backends.ops.footprint import Footprint, pairs, saved
from backends.ops.made_up import Kind, scaled, with_another
from backends.ops.near import COARSE, KINKS, KINKS_COARSELY, fingerprint, near, same
from backends.ops.persample import PerSample
from backends.ops.places import GUESSES, Guess, Layout
from backends.ops.questions import Questions
from backends.precision import rounding
from backends.probe import some, some_targets
from backends.running import kept_buffers, seeded
from backends.shortage import lack_of_memory

if TYPE_CHECKING:
    from backends.ops.passes import Passes, Way

SIZES = 3, 4  # samples of the batch that are looked at, in order and backwards

OTHERS: tuple[tuple[int, Kind], ...] = ((0, "other"), (-1, "other"), (-1, "alike"), (0, "almost"), (0, "outlier"))
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
def looked(passes: "Passes", inputs: Batch, targets: Tensor, answers: tuple[bool, ...] | None) -> Looked:
    """Return which ways are right where all samples give these answers, if they are to give any, and what they hold.

    Of dropout, a pass over the batch must be right without it too, since gradients cannot be held against those of a
    sample alone where it draws.
    """
    whole, few = (inputs, targets), _few(inputs, targets)
    drawn = draws(passes, few[-1])
    look = _Look(passes, whole, few, answers or (), drawn)
    plain = passes.one_by_one(with_rules=False)
    if size(inputs) == 1:
        right, _ = look.judged(look.run(passes.one_by_one(with_rules=True)))
        return Looked([*(c.way for c in right), plain], True, look.footprint(right))
    sure, over = True, list[_Candidate]()
    if drawn == "dropout" and answers is not None:
        with without_dropout():
            dry = look._replace(drawn="nothing")
            right, prints = dry.judged(list(dry.over_the_batch()))
        sure = all(_tells_apart(c.layout, prints, size(inputs)) for c in right if c.layout)
        over = list(look.over_the_batch()) if right and sure else []
    elif drawn == "nothing" and answers is not None:
        over = list(look.over_the_batch())
    right, prints = look.judged([*over, *look.run(passes.under_vmap(True, look.answers))])
    others = [c for c in right if c.layout is None]
    if not others:
        slower = passes.under_vmap(False, look.answers), passes.one_by_one(with_rules=True)
        others = look.judged(look.run(*slower))[0]
    answered = any(c.way.name != plain.name for c in others)  # by vmap
    over = [c for c in right if c.layout is not None and (answered or not c.asks)]
    sure = sure and all(_tells_apart(c.layout, prints, size(inputs)) for c in over if c.layout)
    sure = sure and all(c.layout == over[0].layout for c in over)  # else nothing shows whose some rows are
    found = [*(over[:1] if sure else []), *others]
    return Looked([*(c.way for c in found), plain], sure, look.footprint(found))


@precision.without_tf32()
def holds(passes: "Passes", way: "Way", inputs: Batch, targets: Tensor) -> bool:
    """Return whether a way finds what plain autograd does for some samples of a whole batch, as far as memory allows.

    A few samples do not show what begins with more of them: a capacity, a share that is dropped, a rare outlier. So the
    samples of the least and the largest loss are looked at, and the last one; without dropout, and then with it.
    """
    whole = inputs, targets

    def right(shown: Sequence[int], drawn: Draws) -> bool:
        with seeded(passes.model, 0), kept_buffers(passes.model):
            found = way.run(*copied(whole), lambda _, g: [g.rows(slice(i, i + 1))[0].clone() for i in shown])
        each = enumerate(truths(passes, whole, shown, drawn))
        slack = KINKS if rounding(next(iter(passes.values.values()))) < COARSE else KINKS_COARSELY
        return all(near({name: rows[k] for name, rows in found.items()}, truth, slack) for k, truth in each)

    try:
        with without_dropout():
            with kept_buffers(passes.model):
                losses = passes.loss_fn(call(passes.model, apply(torch.clone, inputs)), targets.clone()).detach()
            shown = sorted({int(losses.argmin()), int(losses.argmax()), size(inputs) - 1})
            if not right(shown, "nothing"):
                return False
        return draws(passes, _few(inputs, targets)[-1]) == "nothing" or right(shown, "dropout")
    except Exception as error:
        if lack_of_memory(error):
            return True
        raise


def _few(inputs: Batch, targets: Tensor) -> list[Sample]:
    return list(zip(some(inputs, SIZES), some_targets(targets, SIZES), strict=True))[-2:]


class _Look(NamedTuple):
    """A look at a few samples.

    Attributes:
        passes: The model's.
        whole: The batch.
        few: Samples of it, in order and backwards.
        answers: What all of them answer.
        drawn: What the model draws.
    """

    passes: "Passes"
    whole: Sample
    few: Sequence[Sample]
    answers: tuple[bool, ...]
    drawn: Draws

    def footprint(self, right: Sequence[_Candidate]) -> Footprint:
        """Return what an ordinary step and the cheapest right way hold; nothing where that cannot be counted."""
        passes, (inputs, targets) = self.passes, copied(alone(self.few[0], 0))
        there, step = [*passes.model.parameters(), *passes.model.buffers(), *tensors(inputs)], 0
        with going_on():
            step = saved(partial(passes.plain, inputs, targets), there)
        changes = any(t._version for t in tensors(inputs))
        result = sum(p.nbytes for p in passes.values.values())
        return Footprint(step, pairs(right[0].found[-1].values()) if right else 0, result, changes)

    def run(self, *ways: "Way") -> list[_Candidate]:
        """Return those ways that can be run."""

        def ran(way: "Way", batch: Sample) -> dict[str, PerSample]:
            with kept_buffers(self.passes.model):
                return way.run(*copied(batch), itself)

        found = []
        for way in ways:
            with going_on():
                found.append(_Candidate(way, [ran(way, batch) for batch in self.few]))
        return found

    def over_the_batch(self) -> Iterator[_Candidate]:
        """Yield ways over the batch, for what may be guessed of it."""
        any_found = False
        for guess in GUESSES:
            if any_found and not guess.shared:  # which is for those that nothing else fits
                return
            found = self._over_the_batch(guess)
            if found is not None and found.layout is not None:
                yield found
                any_found = True
                if found.layout.one_row():
                    return

    def _over_the_batch(self, guess: Guess) -> _Candidate | None:
        found, batch = None, self.few[-1]
        with going_on():
            guess = guess._replace(sizes={len(y): self.passes.sizes(*copied((x, y)), guess) for x, y in self.few})
            with Questions() as questions:
                (first, earlier, _), (second, layout, seen) = (self._seen(batch, guess) for batch in self.few)
            placed = earlier == layout and layout.answers == self.answers and not questions.ordered
            others = (self._with_another(*other) for other in OTHERS)
            if placed and not any(self._is_touched(*other, seen, guess) for other in others):
                by_size = scaled(batch, *self.whole)
                if self._are_right(by_size, self._made_up(by_size, guess)[0]):
                    way = self.passes.over_the_batch(layout)
                    found = _Candidate(way, [first, second], layout, questions.asked)
        return found

    def _seen(self, batch: Sample, guess: Guess) -> tuple[dict[str, PerSample], Layout, list[Tensor]]:
        with seeded(self.passes.model, 0):  # which changes nothing for a model that does not draw
            return self.passes.looked_at(*copied(batch), guess)

    def _with_another(self, place: int, kind: Kind) -> tuple[Sample, Tensor]:
        """Return a batch with another sample, and which are as they were; inputs that would change answers are, too."""

        def goes_elsewhere(made: Sample) -> bool:
            try:
                return self.passes.asked(*made).given != self.answers
            except OtherAnswers:
                return True

        batch, inputs = self.few[-1], self.whole[0]
        made, kept = with_another(batch, place, inputs, kind)
        if self.answers and goes_elsewhere(made):
            every = range(len(tensors(batch[0])))
            changed = [k for k in every if not goes_elsewhere(with_another(batch, place, inputs, kind, [k])[0])]
            made, kept = with_another(batch, place, inputs, kind, changed)
        return made, kept

    def _is_touched(self, batch: Sample, kept: Tensor, seen: Sequence[Tensor], guess: Guess) -> bool:
        """Return whether samples show something else at a tap once another one of them is another.

        That other one is in new company too, so its gradients, and everyone's, are held against those of it alone.
        """
        found, after = self._made_up(batch, guess)
        if not all(same(a, b, kept) for a, b in zip(seen, after, strict=bool(found))):
            return True
        return not self._are_right(batch, found)

    def _made_up(self, batch: Sample, guess: Guess) -> tuple[dict[str, PerSample], list[Tensor]]:
        """Return what a pass over a made-up batch finds, and shows at each tap.

        That is nothing where it is out of bounds, or answers otherwise and so goes another way.
        """
        with going_on():
            found, made_up, seen = self._seen(batch, guess)
            if made_up.answers == self.answers:
                return found, seen
        return {}, []

    def _are_right(self, batch: Sample, found: dict[str, PerSample]) -> bool:
        """Return whether the gradients of made-up samples are those that each has by plain autograd, if it has them."""
        if not found or rounding(next(iter(self.passes.values.values()))) >= COARSE:
            return True  # far numbers round too far to tell
        for i in range(size(batch[0])):
            truth: list[Named] = []
            with going_on():
                truth = truths(self.passes, batch, [i], self.drawn)
            if truth and not near(row(found, i), truth[0], KINKS):
                return False
        return True

    def judged(self, candidates: Sequence[_Candidate]) -> tuple[list[_Candidate], dict[str, list[tuple[float, ...]]]]:
        """Return the candidates that agree with plain autograd, and fingerprints of gradients by name.

        Of a model that draws, a pass over the batch draws as an ordinary one does. Other ways draw otherwise, and are
        right if they find the same without rules.
        """
        drawn, right = self.drawn, list(candidates)
        prints: dict[str, list[tuple[float, ...]]] = defaultdict(list)
        if drawn != "nothing":
            right = [c for c in right if c.layout or draws_as_without_rules(self.passes, c.way, self.few[-1])]
        compared = [c for c in right if drawn == "nothing" or c.layout]
        for b, batch in enumerate(self.few if compared else []):
            prints.clear()  # those of the last batch are looked at
            for i, truth in enumerate(truths(self.passes, batch, range(size(batch[0])), drawn)):
                wrong = [c for c in compared if not near(row(c.found[b], i), truth)]
                right = [c for c in right if c not in wrong]
                for name, g in truth.items():
                    prints[name].append(fingerprint(g))
        return right, prints


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


def itself(name: str, g: PerSample) -> PerSample:
    """Return what is wanted of a parameter's gradients where they are looked at: all."""
    return g


@contextmanager
def going_on() -> Iterator[None]:
    """Go on after the block when it fails, unless that is for want of memory."""
    try:
        yield
    except Exception as error:  # whatever a model's code may raise
        if lack_of_memory(error):
            raise
