"""One forward pass, and one backward pass that makes no weight gradient: as an ordinary step's wherever that is right.

The passes run over the batch where every use of a parameter is by an op that a rule covers, with the samples in one
place; where a few samples, in order and backwards, show the gradients that each has when it is run alone; and where
nothing asks for values that belong to a sample, by which others might go another way, but whether something holds for
the inputs of all of them, or of any (`answers.py`). Control flow and layout may depend on the form of the inputs, so
each form is looked at anew (`ways.py`). An op that has no rule runs under vmap by itself (`vmapped.py`).

Elsewhere they run under `torch.func.vmap`, where what belongs to a sample is known by construction, whatever the model
does with its axes. Every trainable parameter is there as N copies, one a sample, which take no memory (stride 0):
autograd differentiates by them wherever no rule applies, and that is right for any op. The backward pass is ordinary
autograd over the batch, since vmap is over by then. vmap costs time at each op, and takes fused kernels away.

What vmap cannot run either (control flow that depends on the data, checkpoints, packed sequences) is run one sample at
a time, as by a loop; pairs are kept all the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from backends import precision
from backends.base import LossFn, Named, trainable
from backends.batch import Batch, apply, call, size, take, tensors
from backends.ops.answers import Asked, OtherAnswers, Told
from backends.ops.look import itself
from backends.ops.made import Clean
from backends.ops.persample import Dense, PerSample
from backends.ops.places import Guess, Layout, Sizes
from backends.ops.recorder import Each, Recorder
from backends.ops.recurrent import leave_unflattened
from backends.ops.several import Stacked
from backends.ops.taps import Uncovered
from backends.running import kept_attributes, kept_buffers, kept_random_state
from backends.shortage import lack_of_memory

PerParameter: TypeAlias = dict[str, PerSample]

OVER_THE_BATCH, ONE_BY_ONE = "over the batch", "one by one"


class Way(NamedTuple):
    """A way to run both passes: (inputs, targets, what is wanted of each parameter's g_i) -> that, by name.

    Attributes:
        name: Its name.
        run: Runs it.
        answers: It is right where the batch gives these.
    """

    name: str
    run: Callable[[Batch, Tensor, Each], dict[str, Any]]
    answers: tuple[bool, ...] = ()


@dataclass
class Passes:
    """Both passes of a model, in every way.

    Attributes:
        model: The backend's own copy.
        loss_fn: (outputs [N, ...], targets [N, ...]) -> losses [N].
        values: The parameters without gradient, by name.
    """

    model: nn.Module
    loss_fn: LossFn

    def __post_init__(self) -> None:
        self.parameters = trainable(self.model)
        self.values = {name: p.detach() for name, p in self.parameters.items()}
        self._names = _by_identity(self.parameters)

    def asked(self, inputs: Batch, targets: Tensor) -> Asked:
        """Return what a pass over a batch is asked; nothing where there is none.

        Raises:
            OtherAnswers: Its samples are not of one mind.
        """
        inputs, targets = apply(torch.clone, inputs), targets.clone()
        asked = Asked([*tensors(inputs), targets])
        try:
            with kept_buffers(self.model), kept_random_state(self.model), kept_attributes(self.model):
                self._forward(inputs, targets, asked=asked, with_rules=False)
        except OtherAnswers:
            raise
        except Exception as error:  # whatever a model's code may raise
            if lack_of_memory(error):
                raise
            return Asked([targets])
        return asked

    def over_the_batch(self, layout: Layout) -> Way:
        """Return the way over the batch, where the samples' places are known."""

        def run(inputs: Batch, targets: Tensor, each: Each) -> dict[str, Any]:
            asked = Asked([*tensors(inputs), targets], layout.answers)
            recorder = self._batch_pass(inputs, targets, known=layout, each=each, asked=asked)
            asked.end()
            if (recorder.at, recorder.copies) != (layout.names, layout.copies):
                raise Uncovered
            return recorder.all_wanted(size(inputs))

        return Way(OVER_THE_BATCH, run, layout.answers)

    def sizes(self, inputs: Batch, targets: Tensor, guess: Guess) -> list[Sizes]:
        """Return the sizes of what goes into the ops that have rules."""
        asked = Asked([*tensors(inputs), targets])
        with kept_buffers(self.model), kept_random_state(self.model):
            recorder, *_ = self._forward(inputs, targets, guess=guess, asked=asked)
        return recorder.sizes

    def looked_at(self, inputs: Batch, targets: Tensor, guess: Guess) -> tuple[PerParameter, Layout, list[Tensor]]:
        """Return what a pass over the batch finds, the samples' places in it, and what was seen at taps [N, ...]."""
        seen, asked = list[Tensor](), Asked([*tensors(inputs), targets])
        with kept_buffers(self.model):
            recorder = self._batch_pass(inputs, targets, guess=guess, seen=seen, asked=asked)
        asked.end()
        found = recorder.all_wanted(size(inputs))
        uses = {name: count for name, count in recorder.uses.items() if name in self.values}
        known = recorder.places, uses, recorder.at, recorder.is_made, recorder.copies, asked.given, recorder.vmapped
        return found, Layout(*known), seen

    def under_vmap(self, with_rules: bool, answers: tuple[bool, ...] = ()) -> Way:
        """Return the way under vmap, where all samples give these answers."""
        return Way("under vmap", partial(self._vmapped, with_rules, answers), answers)

    def one_by_one(self, *, with_rules: bool) -> Way:
        """Return the way that runs one sample at a time."""
        return Way(ONE_BY_ONE, partial(self._one_by_one, with_rules))

    def plain(self, inputs: Batch, targets: Tensor) -> Named:
        """Return the gradients of one sample {name: [*shape]} by ordinary autograd."""
        with kept_buffers(self.model):
            return self._by_autograd(self.loss_fn(call(self.model, inputs), targets).sum())

    def among(self, inputs: Batch, targets: Tensor, which: Sequence[int]) -> list[Named]:
        """Return some samples' gradients {name: [*shape]} by ordinary autograd, of one forward pass of all samples."""
        losses = self.loss_fn(call(self.model, inputs), targets)
        return [self._by_autograd(losses[i], again=True) for i in which]

    def _by_autograd(self, loss: Tensor, *, again: bool = False) -> Named:
        """Return the gradients of a loss, of which others may be wanted again; checkpoints allow for no other call."""
        self.model.zero_grad(set_to_none=True)  # a call that failed may have left some
        torch.autograd.backward(loss, retain_graph=again)
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.parameters.items()}
        self.model.zero_grad(set_to_none=True)
        return {name: _dense(g) for name, g in found.items()}

    def _batch_pass(self, inputs: Batch, targets: Tensor, **how: Any) -> Recorder:  # noqa: ANN401
        """Return the recorder of both passes, see there."""
        recorder, losses, token = self._forward(inputs, targets, **how)
        _, missed = self._backward(recorder, losses, token, {})
        if missed:
            raise Uncovered
        return recorder

    def _forward(self, inputs: Batch, targets: Tensor, **how: Any) -> tuple[Recorder, Tensor, Tensor]:  # noqa: ANN401
        """Run the forward pass over the batch; return its recorder, the losses and the token."""
        n = size(inputs)
        token = self._token(n)
        if n > 1 and "known" not in how:
            how["clean"] = Clean(self.model)
        recorder = self._recorder({}, token, samples=n, **how)
        with recorder:
            losses = self.loss_fn(call(self.model, inputs), targets)
        if losses.shape != (n,):
            raise Uncovered
        return recorder, losses, token

    def _vmapped(
        self, with_rules: bool, answers: tuple[bool, ...], inputs: Batch, targets: Tensor, each: Each
    ) -> dict[str, Any]:
        n = size(inputs)
        copies = {name: p.expand(n, *p.shape).requires_grad_() for name, p in self.values.items()}
        recorders, tellers = list[Recorder](), list[Told]()

        def loss(
            copies: Named, token: Tensor, buffers: Named, inputs: Batch, targets: Tensor
        ) -> tuple[Tensor, list[Tensor]]:
            inputs, targets = apply(lambda t: t[None], inputs), apply(lambda t: t[None], targets)
            tellers.append(Told([*tensors(inputs), targets], answers))
            recorders.append(self._recorder(copies, token, asked=tellers[0], with_rules=with_rules, each=each))
            with recorders[0]:
                outputs = call(lambda *a, **k: functional_call(self.model, (copies, buffers), a, k), inputs)
                return self.loss_fn(outputs, targets).sum(), tellers[0].own

        token, buffers = self._token(n), {name: b.clone() for name, b in self.model.named_buffers()}
        with kept_attributes(self.model):  # a tensor of vmap's is dead after it
            leave_unflattened(self.model)
            vmapped = vmap(loss, (0, 0, None, 0, 0), randomness="different")
            losses, own = vmapped(copies, token, buffers, inputs, targets)
        tellers[0].check(own)
        by_copies, missed = self._backward(recorders[0], losses, token, copies)
        if missed:  # a parameter is used by a reference that the model has kept, which is no copy
            raise Uncovered
        for name, g in by_copies.items():
            recorders[0].found[name].append(Dense(g))
        return recorders[0].all_wanted(n)

    def _one_by_one(self, with_rules: bool, inputs: Batch, targets: Tensor, each: Each) -> dict[str, Any]:
        alone = self._of_one if with_rules else self._of_one_plainly
        if size(inputs) == 1:
            return alone(inputs, targets, each)
        found = []
        for i in range(size(inputs)):
            with kept_buffers(self.model), kept_attributes(self.model):  # one that counts its calls, say
                found.append(alone(take(inputs, slice(i, i + 1)), targets[i : i + 1], itself))
        with torch.no_grad(), precision.without_autocast(targets.device):
            return {name: each(name, Stacked([one.pop(name) for one in found])) for name in self.values}

    def _of_one(self, inputs: Batch, targets: Tensor, each: Each) -> dict[str, Any]:
        token = self._token(1)
        recorder = self._recorder({}, token, samples=1, each=each)
        with recorder:
            losses = self.loss_fn(call(self.model, inputs), targets)
            _, direct = self._backward(recorder, losses, token, {})  # a checkpoint runs again what it has run
        for name, g in direct.items():
            recorder.found[name].append(Dense(_dense(g)[None]))
        return recorder.all_wanted(1)

    def _of_one_plainly(self, inputs: Batch, targets: Tensor, each: Each) -> dict[str, Any]:
        found = self.plain(inputs, targets)
        with torch.no_grad(), precision.without_autocast(targets.device):
            return {name: each(name, Dense(g[None])) for name, g in found.items()}

    def _token(self, n: int) -> Tensor:
        """Return a zero of each sample's own, which has a gradient."""
        return next(iter(self.values.values())).new_zeros(n).requires_grad_()

    def _recorder(self, copies: Named, token: Tensor, **how: Any) -> Recorder:  # noqa: ANN401  see `Recorder`
        names = {**self._names, **_by_identity(copies)} if copies else self._names
        return Recorder(names, self.values, token, **how)

    def _backward(self, recorder: Recorder, losses: Tensor, token: Tensor, copies: Named) -> tuple[Named, Named]:
        """Run the backward pass; return the gradients of copies and of parameters that were used without a rule."""
        recorder.forward_is_over = True
        wanted = [token, *copies.values(), *self.parameters.values()]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if losses.requires_grad:
            with precision.without_autocast(losses.device):  # a wider product of pairs would be cast back
                found = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
        used = [(name, g) for name, g in zip([*copies, *self.parameters], found[1:], strict=True)]
        by_copies, direct = used[: len(copies)], used[len(copies) :]
        return {k: g for k, g in by_copies if g is not None}, {k: g for k, g in direct if g is not None}


def _by_identity(given: Mapping[str, Tensor]) -> dict[int, str]:
    return {id(p): name for name, p in given.items()}


def _dense(g: Tensor) -> Tensor:
    return g.to_dense() if g.is_sparse else g
