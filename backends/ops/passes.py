"""One forward pass, and one backward pass that makes no weight gradient: as an ordinary step's, or under vmap.

Under `torch.func.vmap` what belongs to a sample is known by construction, whatever the model does with its axes. Every
trainable parameter is there as N copies, one a sample, which take no memory (stride 0): autograd differentiates by them
wherever no rule applies, and that is right for any op. The backward pass is ordinary autograd over the batch, since
vmap is over by then.

vmap costs time at each op, and takes fused kernels away. So the passes are those of an ordinary step wherever that is
known to be the same: every use of a parameter is by an op that a rule covers, with the samples in one place; and for a
few samples, in order and backwards, every gradient is what it is under vmap. Control flow and layout may depend on the
form of the inputs, so each form is looked at anew. A parameter [1, ...] (a position embedding, say) may be used by any
op: it is there as [N, ...].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from backends.base import LossFn, Named, Unsupported, trainable
from backends.batch import Batch, apply, call, signature, size
from backends.ops.persample import Dense, PerSample, added
from backends.ops.rules import CHOSEN
from backends.ops.taps import Place, Recorder, Uncovered
from backends.probe import some, some_targets
from backends.running import kept_buffers

PerParameter: TypeAlias = dict[str, PerSample]

SAME = {torch.bfloat16: 0.1, torch.float16: 0.1}
"""How far gradients may be apart, relative to their norm, that are the same but for rounding and kinks."""

SAME_ELSEWHERE = 0.01

NOISE = 8
"""Roundings of the whole gradient that one of a parameter may be apart besides: some are zero but for rounding."""


@dataclass
class Passes:
    """Both passes of a model: `passes(inputs, targets)` returns each parameter's g_i, by name.

    Attributes:
        model: The backend's own copy.
        loss_fn: (outputs [N, ...], targets [N, ...]) -> losses [N].
        layouts: By the form of the inputs, the samples' place at each tap of a pass over the batch; None: under vmap.
        with_rules: Whether there are rules at all under vmap.
    """

    model: nn.Module
    loss_fn: LossFn
    layouts: dict[tuple[object, ...], Sequence[Place] | None] = field(default_factory=dict)
    with_rules: bool = True

    def __post_init__(self) -> None:
        self.parameters = trainable(self.model)
        self.values = {name: p.detach() for name, p in self.parameters.items()}

    def __call__(self, inputs: Batch, targets: Tensor) -> PerParameter:
        """Run both passes.

        Raises:
            Unsupported: A parameter was used out of sight.
        """
        form = (signature(inputs), size(inputs) > 1)  # one sample alone has no order
        if form not in self.layouts:
            self._remember(form, self._layout(inputs, targets))
        layout = self.layouts[form]
        if layout is not None:
            try:
                return self._over_the_batch(inputs, targets, layout)[0]
            except Uncovered:  # it depends on more than the form
                self._remember(form, None)
        return self._under_vmap(inputs, targets)

    def _remember(self, form: tuple[object, ...], layout: Sequence[Place] | None) -> None:
        self.layouts[form] = layout
        CHOSEN[f"passes of {type(self.model).__name__}"] = "under vmap" if layout is None else "over the batch"

    def _layout(self, inputs: Batch, targets: Tensor) -> Sequence[Place] | None:
        """Return the samples' places if passes over the batch find for a few samples what passes under vmap find."""
        try:
            few = list(zip(some(inputs), some_targets(targets), strict=True))
            theirs = [self._under_vmap(*batch) for batch in few]
            for apart in (False, True):
                ours, layouts = zip(*(self._over_the_batch(*batch, apart=apart) for batch in few), strict=True)
                with torch.no_grad():
                    if layouts[-2:] == layouts[-1:] * len(layouts[-2:]) and all(map(_near, ours, theirs)):
                        return layouts[-1]  # type: ignore[no-any-return]  # zip forgets what it is given
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever is wrong with the model, or is not to be had here, shows under vmap
            return None
        return None

    def _over_the_batch(
        self, inputs: Batch, targets: Tensor, known: Sequence[Place] | None = None, *, apart: bool = False
    ) -> tuple[PerParameter, Sequence[Place]]:
        n = size(inputs)
        token = self._token(n)
        copies = {
            name: p.expand(n, *p.shape[1:]).requires_grad_()
            for name, p in self.values.items()
            if p.dim() > 1 and len(p) == 1
        }
        names = {id(p): name for given in (self.parameters, copies) for name, p in given.items()}
        recorder = Recorder(names, self.values, token, samples=n, known=known, apart=apart)
        with kept_buffers(self.model), recorder:  # other passes start from the same state
            losses = self.loss_fn(call(self._with(copies), inputs), targets)
        if losses.shape != (n,):
            raise Uncovered
        direct = self._backward(recorder, losses, token, [*copies.values(), *self.parameters.values()])
        if any(g is not None for g in direct[len(copies) :]):
            raise Uncovered
        for name, g in zip(copies, direct, strict=False):
            if g is not None:
                recorder.found[name].append(Dense(g[:, None]))
        return self._added(recorder, n), recorder.places

    def _with(self, copies: Named) -> Callable[..., Tensor]:
        """Return the model as it runs with copies in the place of some parameters."""
        return (lambda *a, **k: functional_call(self.model, copies, a, k)) if copies else self.model

    def _under_vmap(self, inputs: Batch, targets: Tensor) -> PerParameter:
        try:
            return self._vmapped(inputs, targets)
        except Uncovered:
            self.with_rules = False
            return self._vmapped(inputs, targets)

    def _vmapped(self, inputs: Batch, targets: Tensor) -> PerParameter:
        n = size(inputs)
        copies = {name: p.expand(n, *p.shape).requires_grad_() for name, p in self.values.items()}
        token = self._token(n)
        recorders: list[Recorder] = []

        def loss(copies: Named, token: Tensor, buffers: Named, inputs: Batch, targets: Tensor) -> Tensor:
            names = {id(p): name for given in (self.parameters, copies) for name, p in given.items()}
            recorder = Recorder(names, self.values, token, self.with_rules)
            recorders.append(recorder)
            inputs, targets = apply(lambda t: t[None], inputs), apply(lambda t: t[None], targets)
            with recorder:
                outputs = call(lambda *a, **k: functional_call(self.model, (copies, buffers), a, k), inputs)
                return self.loss_fn(outputs, targets).sum()

        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        losses = vmap(loss, (0, 0, None, 0, 0), randomness="different")(copies, token, buffers, inputs, targets)
        (recorder,) = recorders
        direct = self._backward(recorder, losses, token, [*copies.values(), *self.parameters.values()])
        for name, g, missed in zip(copies, direct, direct[len(copies) :], strict=False):
            if missed is not None:
                raise Unsupported(f"parameter `{name}` is used out of sight, by a reference that the model has kept")
            if g is not None:
                recorder.found[name].append(Dense(g))
        return self._added(recorder, n)

    def _token(self, n: int) -> Tensor:
        """Return a zero of each sample's own, which has a gradient."""
        return next(iter(self.values.values())).new_zeros(n).requires_grad_()

    def _backward(
        self, recorder: Recorder, losses: Tensor, token: Tensor, wanted: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Run the backward pass, and return the gradients by what may have been used outside of rules."""
        recorder.forward_is_over = True
        if not losses.requires_grad:
            return [None] * len(wanted)
        return torch.autograd.grad(losses.sum(), [token, *wanted], allow_unused=True)[1:]

    def _added(self, recorder: Recorder, n: int) -> PerParameter:
        return {name: added(recorder.found.pop(name), n, p) for name, p in self.values.items()}


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
