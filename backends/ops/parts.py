"""A batch in parts, one after the other: as many as is fastest, of those that take little more memory than a step.

What samples add to a result does not depend on each other. Parts hold less at a time, of which on a CPU more stays in
its caches; and where gradients that a norm was made of would not fit beside a whole batch, those of a part may, and
need not be made again for a clipped sum. But each part pays for every op anew. So both are measured, when a form of
inputs is new.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import ceil, inf
from typing import Generic, TypeVar

import torch
from torch import Tensor

from backends.batch import Batch, apply, signature, size, tensors
from backends.derived import chunks
from backends.heap import give_back
from backends.ops.choice import CHOSEN, TRIES, capturing, timed
from backends.ops.footprint import FREE
from backends.ops.live import peak
from backends.ops.look import going_on
from backends.ops.pages import release
from backends.shortage import enough_for, lack_of_memory

R = TypeVar("R")

LEAST = 4  # samples in a part, unless memory asks for fewer
MOST = 8  # parts, unless memory asks for more
WITHIN = 1.3  # times the peak memory of an ordinary step
SAVES = 0.9  # times the memory, or less, that twice as many parts must take to be worth it
EQUAL = 1.02  # times as long is as fast: then more parts are better, since they hold less
CLEARLY = 1.05  # times as long, the shorter of two each, is slower
LONG = 1.0  # seconds after which nothing is timed again


@dataclass
class InParts(Generic[R]):
    """A function of (inputs, targets), run on parts of the batch.

    Attributes:
        run: The function.
        step: What an ordinary step computes of them.
        merge: The parts' results -> the result.
        what: What it computes, for the record of choices.
        counts: How many parts are best, by the form of inputs and about how many samples there are.
    """

    run: Callable[[Batch, Tensor], R]
    step: Callable[[Batch, Tensor], object]
    merge: Callable[[list[R]], R]
    what: str
    counts: dict[object, int] = field(default_factory=dict)

    def __call__(self, inputs: Batch, targets: Tensor) -> R:
        """Return the result; what does not fit after all, as where memory is in pieces, is run in more parts."""
        form, given = _form(inputs, targets), [*tensors(inputs), targets]
        versions = [t._version for t in given]
        while True:
            count = self.counts.get(form, 1)
            try:
                return self._in(count, inputs, targets)
            except Exception as error:
                changed = [t._version for t in given] != versions
                if not lack_of_memory(error) or count >= size(inputs) or changed or capturing(targets):
                    raise
            gc.collect()  # what a pass that failed has left
            release()
            give_back()
            self.counts[form] = min(2 * count, size(inputs))
            self._say(self.counts[form], size(inputs))

    def knows(self, inputs: Batch, targets: Tensor) -> bool:
        """Return whether it is known how many parts are best, or there is no choice."""
        return _form(inputs, targets) in self.counts or size(inputs) == 1 or capturing(targets)

    def choose(self, inputs: Batch, targets: Tensor) -> None:
        """Measure how many parts are best: twice as many while that takes too much memory, or does not take longer."""
        n, (best, most) = size(inputs), self._least(inputs, targets)
        while (more := 2 * best) <= MOST and n >= more * LEAST:
            self._try(more, inputs, targets)
            seconds = self._seconds((best, more), inputs, targets)
            if not seconds[more] <= EQUAL * seconds[best] or _peak(partial(self._in, more), inputs, targets) > most:
                break
            best = more
        release()  # memory of what has been tried, in sizes that may not come again
        self.counts[_form(inputs, targets)] = best
        self._say(best, n)

    def _say(self, count: int, n: int) -> None:
        CHOSEN[f"{self.what} of {n} samples"] = "all at once" if count == 1 else f"in {count} parts"

    def _least(self, inputs: Batch, targets: Tensor) -> tuple[int, float]:
        """Return how many parts there must be for memory's sake, and how many bytes may be taken."""
        best, most = 1, inf
        with going_on():  # a step of a whole batch may fail where samples alone do not: then there is no bound
            least = self._taken(1, inputs, targets)
            most = FREE if least < FREE else max(FREE, WITHIN * _peak(self.step, inputs, targets))
            for count in _doublings(size(inputs)):
                if least < most:
                    break
                now = self._taken(count, inputs, targets)
                if now > max(most, SAVES * least):  # a gradient of all parameters may be more than what samples take
                    break
                best, least = count, now
            most = max(most, least)
        return best, most

    def _taken(self, count: int, inputs: Batch, targets: Tensor) -> float:
        """Return how many bytes so many parts take at most."""
        self._try(count, inputs, targets)
        return _peak(partial(self._in, count), inputs, targets)

    def _try(self, count: int, inputs: Batch, targets: Tensor) -> None:
        """Run so many parts: new ways are tried now, which takes time and memory of its own."""
        enough_for(partial(_on_copies, partial(self._in, count), inputs, targets))

    def _in(self, count: int, inputs: Batch, targets: Tensor) -> R:
        if count == 1:
            return self.run(inputs, targets)
        most = ceil(size(inputs) / count)
        return self.merge([self.run(*part) for part in chunks(inputs, targets, most)])

    def _seconds(self, counts: tuple[int, int], inputs: Batch, targets: Tensor) -> dict[int, float]:
        """Return how long each of two counts takes, in turn, until one is clearly faster; both have run before."""
        found, spent = dict.fromkeys(counts, inf), 0.0
        for tries in range(1, TRIES + 1):
            for count in counts:
                seconds = timed(partial(_on_copies, partial(self._in, count), inputs, targets), targets)
                found[count], spent = min(found[count], seconds), spent + seconds
            if spent > LONG or (tries > 1 and max(found.values()) > CLEARLY * min(found.values())):
                break
        return found


def _doublings(n: int) -> list[int]:
    """Return 2, 4, … up to N."""
    return [*(1 << k for k in range(1, (n - 1).bit_length())), n]


def _peak(run: Callable[[Batch, Tensor], object], inputs: Batch, targets: Tensor) -> float:
    """Return how many bytes a call takes at most beside its inputs; endless where it needs more than there is."""
    found = [inf]
    enough_for(partial(_on_copies, lambda *copies: found.append(peak(partial(run, *copies))), inputs, targets))
    return found[-1]


def _on_copies(run: Callable[[Batch, Tensor], object], inputs: Batch, targets: Tensor) -> None:
    """Run a call that is a try on copies: a model may change its inputs in place."""
    run(apply(torch.clone, inputs), targets.clone())


def _form(inputs: Batch, targets: Tensor) -> object:
    return signature(inputs), signature(targets), _about(size(inputs))


def _about(n: int) -> int:
    """Return N to four binary digits: batches of about one size, as by Poisson sampling, have as many parts."""
    rest = max(0, n.bit_length() - 4)
    return n >> rest << rest
