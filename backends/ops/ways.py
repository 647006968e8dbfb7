"""Which way both passes of a model are run: looked for once for each form of the inputs, and what the batch answers."""

from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backends import precision
from backends.batch import Batch, apply, signature, size, take, tensors
from backends.ops.answers import OtherAnswers
from backends.ops.choice import CHOSEN, capturing
from backends.ops.footprint import NOTHING, Footprint
from backends.ops.look import going_on, holds, itself, looked
from backends.ops.made import settled
from backends.ops.passes import ONE_BY_ONE, OVER_THE_BATCH, Passes, Way
from backends.ops.recorder import Each
from backends.ops.several import Grouped
from backends.running import drawn_again, kept_attributes, kept_buffers, kept_random_state
from backends.shortage import lack_of_memory

MOST = 16  # different answers of one form; a batch that then answers otherwise is run without
LOOKS = 8  # at samples that do not tell apart, before they are run under vmap for good


class Known(NamedTuple):
    """What the ways to run both passes are known by: the form of the inputs, and what the batch answers, if it will."""

    form: object
    answers: tuple[bool, ...] | None


@dataclass
class Ways:
    """Both passes in the cheapest way that is right: `ways(inputs, targets, each)`, `each` of each parameter's g_i.

    Attributes:
        of: The model's, run in each way.
        answers: By the form of the inputs, what the last batch answered; None where none are asked any more.
        known: By the form and the answers, the ways that have not failed, the cheapest first.
        unsure: The same, of those that will be looked at again.
        looks: How often these have been looked at.
        footprints: By them too, how much memory the passes hold.
        footprint: That of the inputs that are being run.
        whole: How many samples the batch has that they are a part of.
        extra: How many bytes more than pairs have been kept of them.
        held: By them too, the largest batch whose way over it has been held against plain autograd.
    """

    of: Passes
    answers: dict[object, tuple[bool, ...] | None] = field(default_factory=dict)
    known: dict[Known, list[Way]] = field(default_factory=dict)
    unsure: dict[Known, list[Way]] = field(default_factory=dict)
    looks: Counter[Known] = field(default_factory=Counter)
    footprints: dict[Known, Footprint] = field(default_factory=dict)
    footprint: Footprint = NOTHING
    whole: int = 0
    extra: int = 0
    held: Counter[Known] = field(default_factory=Counter)

    def __call__(self, inputs: Batch, targets: Tensor, each: Each) -> dict[str, Any]:
        """Run both passes; samples that answer otherwise than others are a batch of their own."""
        try:
            return self._of_one_mind(inputs, targets, each)
        except OtherAnswers as other:
            if other.own is None:
                raise
            own = torch.tensor(other.own, device=targets.device)
            groups = [torch.nonzero(own == answer)[:, 0] for answer in (True, False)]
            found = [self(take(inputs, group), targets[group], settled) for group in groups]
            with torch.no_grad(), precision.without_autocast(targets.device):
                return {name: each(name, Grouped([f[name] for f in found], other.own)) for name in self.of.values}

    def _of_one_mind(self, inputs: Batch, targets: Tensor, each: Each) -> dict[str, Any]:
        form = _form(inputs, targets)
        if form not in self.answers or self._may_answer_better(form):
            self.answers[form] = self._answered(form, inputs, targets)
        for _ in range(3):
            answers = self.answers[form]
            try:
                with drawn_again(self.of.model) if answers else nullcontext():
                    return self._run(Known(form, answers), inputs, targets, each)
            except OtherAnswers as other:
                if other.own is not None:
                    raise
                before = {known.answers for known in self.known if known.form == form and known.answers != answers}
                begun = [a for a in before if a and other.given and a[: len(other.given)] == other.given]
                if len(begun) == 1:  # as a batch before
                    self.answers[form] = begun[0]
                else:
                    self.answers[form] = None if len(before) >= MOST else self._answered(form, inputs, targets)
        self.answers[form] = None  # the same batch has not answered the same
        return self._run(Known(form, None), inputs, targets, each)

    def _run(self, form: Known, inputs: Batch, targets: Tensor, each: Each) -> dict[str, Any]:
        ways = self.known.get(form) or self._looked(form, inputs, targets)
        self.footprint = self.footprints[form]
        if ways[0].name == OVER_THE_BATCH and size(inputs) > self.held[form] and not capturing(targets):
            ways = self._held(form, ways, inputs, targets)
        kept = apply(torch.clone, inputs) if self.footprint.changes else inputs
        for count, way in enumerate(ways):
            if count > 0:
                _put_back(kept, inputs)  # the way before has left them half changed
            self.extra = 0  # of a way that failed, nothing is kept
            try:
                with kept_buffers(self.of.model):
                    found = way.run(inputs, targets, each)
            except OtherAnswers:
                if not capturing(targets):  # what is recorded is not asked
                    _put_back(kept, inputs)
                    raise
            except Exception as error:  # whatever a model's code may raise
                if lack_of_memory(error) or count == len(ways) - 1:
                    raise
            else:
                if form in self.known:
                    self.known[form] = ways[count:]
                if size(inputs) > 1:
                    CHOSEN[f"passes of {type(self.of.model).__name__}"] = way.name
                return found
        raise AssertionError("the last way returns or raises")

    def _answered(self, form: object, inputs: Batch, targets: Tensor) -> tuple[bool, ...] | None:
        """Return what all samples of a batch answer; most models ask nothing, which two samples show."""
        if capturing(targets) or size(inputs) == 1:
            return self.answers.get(form, ())
        if form not in self.answers:
            with suppress(OtherAnswers):
                if not self.of.asked(take(inputs, slice(0, 2)), targets[:2]).given:
                    return ()
        return self.of.asked(inputs, targets).given

    def _may_answer_better(self, form: object) -> bool:
        """Return whether samples run one by one for what the last batch answered; another may answer otherwise."""
        ways = self.known.get(Known(form, self.answers[form]))
        names = {ways[0].name for known, ways in self.known.items() if known.form == form}
        slow = self.answers[form] is not None and ways is not None and ways[0].name == ONE_BY_ONE
        return slow and len(names) > 1

    def way(self, inputs: Batch, targets: Tensor) -> Way:
        """Return the way that these inputs are run."""
        self(inputs, targets, itself)
        form = _form(inputs, targets)
        known = Known(form, self.answers[form])
        return (self.known.get(known) or self._looked(known, inputs, targets))[0]

    def _looked(self, form: Known, inputs: Batch, targets: Tensor) -> list[Way]:
        """Return the ways that are right; where samples do not tell, they are looked for again, a few times at most."""
        if form in self.unsure and capturing(targets):  # a look asks for values
            return self.unsure[form]
        with kept_random_state(self.of.model), kept_attributes(self.of.model):  # a first call does what later ones do
            ways, sure, self.footprints[form] = looked(self.of, inputs, targets, form.answers)
        self.looks[form] += 1
        (self.known if sure or self.looks[form] == LOOKS else self.unsure)[form] = ways
        return ways

    def _held(self, form: Known, ways: list[Way], inputs: Batch, targets: Tensor) -> list[Way]:
        """Return the ways that hold for a larger batch than those before."""
        right, other = False, None
        with going_on(), kept_random_state(self.of.model), kept_attributes(self.of.model):
            try:
                right = holds(self.of, ways[0], inputs, targets)
            except OtherAnswers as error:
                other = error
        if other is not None:
            raise other
        self.held[form] = size(inputs)
        if not right:
            ways = self.known[form] = ways[1:]
        return ways


def _form(inputs: Batch, targets: Tensor) -> object:
    device = targets.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return signature(inputs), signature(targets), size(inputs) == 1, autocast


def _put_back(kept: Batch, inputs: Batch) -> None:
    if kept is not inputs:
        for t, was in zip(tensors(inputs), tensors(kept), strict=True):
            t.copy_(was)
