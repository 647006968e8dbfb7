"""One forward pass, and one backward pass that makes no weight gradient: as an ordinary step's wherever that is right.

The passes run over the batch where every use of a parameter is by an op that a rule covers, with the samples in one
place; where a few samples, in order and backwards, show the gradients that each has when it is run alone; and where
nothing asks for values that belong to a sample, by which others might go another way. Control flow and layout may
depend on the form of the inputs, so each form is looked at anew. A parameter [1, ...] (a position
embedding, say) may be used by any op: it is there as [N, ...].

Elsewhere they run under `torch.func.vmap`, where what belongs to a sample is known by construction, whatever the model
does with its axes. Every trainable parameter is there as N copies, one a sample, which take no memory (stride 0):
autograd differentiates by them wherever no rule applies, and that is right for any op. The backward pass is ordinary
autograd over the batch, since vmap is over by then. vmap costs time at each op, and takes fused kernels away.

What vmap cannot run either (control flow that depends on the data, checkpoints, packed sequences) is run one sample at
a time, as by a loop; pairs are kept all the same.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from backends.base import LossFn, Named, trainable
from backends.batch import Batch, apply, call, signature, size, take
from backends.ops.choice import CHOSEN
from backends.ops.persample import Dense, PerSample, Stacked
from backends.ops.questions import Questions
from backends.ops.taps import Each, Layout, Recorder, Uncovered
from backends.probe import some, some_targets
from backends.running import kept_buffers, kept_random_state

PerParameter: TypeAlias = dict[str, PerSample]

SAME = {torch.bfloat16: 0.1, torch.float16: 0.1}
"""How far gradients may be apart, relative to their norm, that are the same but for rounding and kinks."""

SAME_ELSEWHERE = 0.01

NOISE = 8
"""Roundings of the whole gradient that one of a parameter may be apart besides: some are zero but for rounding."""


ONE_BY_ONE = "one by one"


class Way(NamedTuple):
    """A way to run both passes: (inputs, targets, what is wanted of each parameter's g_i) -> that, by name."""

    name: str
    run: Callable[[Batch, Tensor, Each], dict[str, Any]]


@dataclass
class Passes:
    """Both passes of a model: `passes(inputs, targets, each)` returns what `each` makes of each parameter's g_i.

    Attributes:
        model: The backend's own copy.
        loss_fn: (outputs [N, ...], targets [N, ...]) -> losses [N].
        ways: By the form of the inputs, the ways to run them that have not failed, the cheapest first.
        ruleless: Where the model runs without rules only.
    """

    model: nn.Module
    loss_fn: LossFn
    ways: dict[tuple[object, ...], list[Way]] = field(default_factory=dict)
    ruleless: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.parameters = trainable(self.model)
        self.values = {name: p.detach() for name, p in self.parameters.items()}

    def __call__(self, inputs: Batch, targets: Tensor, each: Each) -> dict[str, Any]:
        """Run both passes; what a way cannot do with these very inputs, the next one does."""
        if size(inputs) == 1:
            return self._alone(inputs, targets, each)
        form = signature(inputs)
        if (ways := self.ways.get(form)) is None:
            with kept_random_state(self.model):  # a first call draws what later ones draw
                ways = self._ways(inputs, targets)
        for count, way in enumerate(ways):
            with _going_on(count < len(ways) - 1), kept_buffers(self.model):
                found = way.run(inputs, targets, each)
                self.ways[form] = ways[count:]
                CHOSEN[f"passes of {type(self.model).__name__}"] = way.name
                return found
        raise AssertionError("the last way returns or raises")

    def way(self, inputs: Batch, targets: Tensor) -> Way:
        """Return the way that these inputs are run."""
        if size(inputs) == 1:
            return Way("alone", self._alone)
        self(inputs, targets, _itself)
        return self.ways[signature(inputs)][0]

    def _ways(self, inputs: Batch, targets: Tensor) -> list[Way]:
        """Return the ways that are right for a few samples, the cheapest first; it must be right for others too."""
        few = list(zip(some(inputs), some_targets(targets), strict=True))[1:]
        found, alone = [Way(ONE_BY_ONE, self._one_by_one)], [self._one_by_one(*batch, _itself) for batch in few]
        with _going_on():
            for batch in few:
                self._under_vmap(*batch, _itself)
            found.insert(0, Way("under vmap", self._under_vmap))
        for apart in (False, True):
            with _going_on(), kept_buffers(self.model):
                with Questions() as questions:
                    ours, (layout, again) = zip(*(self._looked_at(*b, apart=apart) for b in few), strict=True)
                answers_are_shared = len(found) > 1  # vmap has given them
                if questions.asked and not answers_are_shared:
                    break
                if layout == again and all(map(_near, ours, alone)):
                    return [Way("over the batch", partial(self._over_the_batch, layout)), *found]
        return found

    def _looked_at(self, inputs: Batch, targets: Tensor, *, apart: bool) -> tuple[PerParameter, Layout]:
        recorder, shared = self._batch_pass(inputs, targets, apart=apart)
        uses = {name: count for name, count in recorder.uses.items() if name not in shared}
        return recorder.all_wanted(size(inputs)), Layout(recorder.places, uses)

    def _over_the_batch(self, layout: Layout, inputs: Batch, targets: Tensor, each: Each) -> dict[str, Any]:
        return self._batch_pass(inputs, targets, known=layout, each=each)[0].all_wanted(size(inputs))

    def _batch_pass(self, inputs: Batch, targets: Tensor, **how: Any) -> tuple[Recorder, Named]:  # noqa: ANN401
        """Return the recorder of both passes, see there, and the parameters that were there as [N, ...]."""
        n = size(inputs)
        shared = {name: p for name, p in self.values.items() if p.dim() > 1 and len(p) == 1}
        copies = {name: p.expand(n, *p.shape[1:]).requires_grad_() for name, p in shared.items()}
        token = self._token(n)
        recorder = self._recorder(copies, token, samples=n, **how)
        model = (lambda *a, **k: functional_call(self.model, copies, a, k)) if copies else self.model
        with recorder:
            losses = self.loss_fn(call(model, inputs), targets)
        if losses.shape != (n,):
            raise Uncovered
        by_copies, missed = self._backward(recorder, losses, token, copies)
        if missed:
            raise Uncovered
        for name, g in by_copies.items():
            recorder.found[name].append(Dense(g[:, None]))
        return recorder, copies

    def _under_vmap(self, inputs: Batch, targets: Tensor, each: Each) -> dict[str, Any]:
        def run(with_rules: bool) -> dict[str, Any]:
            return self._vmapped(inputs, targets, each=each, with_rules=with_rules)

        return self._ruled("under vmap", run)

    def _vmapped(self, inputs: Batch, targets: Tensor, **how: Any) -> dict[str, Any]:  # noqa: ANN401
        n = size(inputs)
        copies = {name: p.expand(n, *p.shape).requires_grad_() for name, p in self.values.items()}
        recorders: list[Recorder] = []

        def loss(copies: Named, token: Tensor, buffers: Named, inputs: Batch, targets: Tensor) -> Tensor:
            recorders.append(self._recorder(copies, token, **how))
            inputs, targets = apply(lambda t: t[None], inputs), apply(lambda t: t[None], targets)
            with recorders[0]:
                outputs = call(lambda *a, **k: functional_call(self.model, (copies, buffers), a, k), inputs)
                return self.loss_fn(outputs, targets).sum()

        token, buffers = self._token(n), {name: b.clone() for name, b in self.model.named_buffers()}
        losses = vmap(loss, (0, 0, None, 0, 0), randomness="different")(copies, token, buffers, inputs, targets)
        by_copies, missed = self._backward(recorders[0], losses, token, copies)
        if missed:  # a parameter is used by a reference that the model has kept, which is no copy
            raise Uncovered
        for name, g in by_copies.items():
            recorders[0].found[name].append(Dense(g))
        return recorders[0].all_wanted(n)

    def _one_by_one(self, inputs: Batch, targets: Tensor, each: Each) -> dict[str, Any]:
        samples = (slice(i, i + 1) for i in range(size(inputs)))
        found = [self._alone(take(inputs, i), take(targets, i), _itself) for i in samples]
        with torch.no_grad():
            return {name: each(name, Stacked([one.pop(name) for one in found])) for name in self.values}

    def _alone(self, inputs: Batch, targets: Tensor, each: Each) -> dict[str, Any]:
        def run(with_rules: bool) -> dict[str, Any]:
            with kept_buffers(self.model):
                return (self._of_one if with_rules else self._plain)(inputs, targets, each)

        return self._ruled("alone", run)

    def _of_one(self, inputs: Batch, targets: Tensor, each: Each) -> dict[str, Any]:
        token = self._token(1)
        recorder = self._recorder({}, token, samples=1, each=each)
        with recorder:
            losses = self.loss_fn(call(self.model, inputs), targets)
            _, direct = self._backward(recorder, losses, token, {})  # a checkpoint runs again what it has run
        for name, g in direct.items():
            recorder.found[name].append(Dense(_dense(g)[None]))
        return recorder.all_wanted(1)

    def _plain(self, inputs: Batch, targets: Tensor, each: Each) -> dict[str, Any]:
        self.model.zero_grad(set_to_none=True)
        torch.autograd.backward(self.loss_fn(call(self.model, inputs), targets).sum())
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.parameters.items()}
        return {name: each(name, Dense(_dense(g)[None])) for name, g in grads.items()}

    def _ruled(self, name: str, run: Callable[[bool], dict[str, Any]]) -> dict[str, Any]:
        """Run with rules if that works, else without: the model itself may differentiate through its ops, say."""
        if name not in self.ruleless:
            with _going_on():
                return run(True)
        found = run(False)
        self.ruleless.add(name)
        return found

    def _token(self, n: int) -> Tensor:
        """Return a zero of each sample's own, which has a gradient."""
        return next(iter(self.values.values())).new_zeros(n).requires_grad_()

    def _recorder(self, copies: Named, token: Tensor, **how: Any) -> Recorder:  # noqa: ANN401  see `Recorder`
        names = {id(p): name for given in (self.parameters, copies) for name, p in given.items()}
        return Recorder(names, self.values, token, **how)

    def _backward(self, recorder: Recorder, losses: Tensor, token: Tensor, copies: Named) -> tuple[Named, Named]:
        """Run the backward pass; return the gradients of copies and of parameters that were used without a rule."""
        recorder.forward_is_over = True
        wanted = [token, *copies.values(), *self.parameters.values()]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if losses.requires_grad:
            found = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
        used = [(name, g) for name, g in zip([*copies, *self.parameters], found[1:], strict=True)]
        by_copies, direct = used[: len(copies)], used[len(copies) :]
        return {k: g for k, g in by_copies if g is not None}, {k: g for k, g in direct if g is not None}


def _itself(name: str, g: PerSample) -> PerSample:
    return g


def _dense(g: Tensor) -> Tensor:
    return g.to_dense() if g.is_sparse else g


@contextmanager
def _going_on(there_is_more: bool = True) -> Iterator[None]:
    """Go on after the block when it fails, unless that is for want of memory, or there is nothing more to try."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model's code may raise
        if not there_is_more:
            raise


@torch.no_grad()
def _near(ours: PerParameter, theirs: PerParameter) -> bool:
    """Return whether the gradients of each sample are the same; one at a time, to bound memory."""
    like = next(iter(theirs.values())).like
    share, noise = SAME.get(like.dtype, SAME_ELSEWHERE), NOISE * torch.finfo(like.dtype).eps
    for i in range(next(iter(theirs.values())).samples):
        pairs = [[found[name].rows(slice(i, i + 1)) for found in (ours, theirs)] for name in theirs]
        gaps = torch.stack([(a - b).norm() for a, b in pairs])
        norms = torch.stack([b.norm() for _, b in pairs])
        if not bool((gaps <= share * norms + noise * norms.norm()).all()):
            return False
    return True
