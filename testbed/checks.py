"""Has the problem per-sample gradients at all? Asked once, before any backend is.

A loss a sample, nothing that couples samples, nothing random: otherwise the *problem* is refused, naming the module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from backends.base import LossFn, Unsupported, first_line, own_copy, place_of
from backends.batch import Batch, call, size, take
from backends.given import refuse_past_the_copy
from backends.probe import spread
from backends.running import batch_gradient, culprit, kept_buffers, kept_random_state, seeded
from testbed.problems.base import Problem, a_thing
from testbed.samples import narrow
from testbed.trace import first_difference

FEW = 4  # samples whose gradients are added up
SUMS = 1e-6  # relative to all gradients: rounding is far below
TOLERANCE = 1e-9  # float64 kernels may sum a batch of another length in another order; coupling is far above it


class Misfit(Unsupported):
    """Model, loss and batch do not fit together: one raises an error, or the loss returns no tensor."""


def refuse_without_gradients(problem: Problem) -> None:
    """Refuse a problem whose samples have no gradients of their own.

    Raises:
        Misfit: Model, loss and batch do not fit together.
        Unsupported: The loss is not one number a sample, or uses the model's parameters past what it is given; samples
            are coupled; the model is random; or a sample has another gradient alone than in a batch.
    """
    model = own_copy(problem.model)  # refuses what cannot be copied, and BatchNorm in training mode with its name
    if any(p.is_complex() for p in model.parameters()):
        raise Unsupported("the model has complex parameters; gradients here are real")
    _losses(problem, model, problem.inputs, problem.targets)  # in the run's own dtype
    wide = problem.to(torch.float64)
    model = own_copy(wide.model)
    losses = _losses(wide, model, wide.inputs, wide.targets)
    n = wide.n
    if losses.shape != (n,):
        raise Unsupported(
            f"the loss returned shape {list(losses.shape)} for {n} samples, it must be [{n}]: one loss a sample; "
            "use reduction='none'"
        )
    if not losses.isfinite().all():
        i = int((~losses.isfinite()).nonzero()[0])
        raise Unsupported(f"the loss of sample {i} is {float(losses[i])}: there is nothing to compare")
    with torch.enable_grad(), kept_buffers(model), kept_random_state(model):
        attached = wide.loss_fn(call(model, wide.inputs), wide.targets)
        if not attached.requires_grad:
            raise Unsupported("the loss does not depend on the parameters: something in model or loss detaches it")
    refuse_past_the_copy(problem.model, attached)
    _refuse_random(wide, model, losses)
    if n > 1:
        _refuse_coupled(wide, model, losses)
        _refuse_other_sums(wide)


def _refuse_other_sums(wide: Problem) -> None:
    """Hold the gradients of a few samples, one by one, against that of their batch, which is their sum.

    InstanceNorm on a CPU is such a case, of one sample and a gradient that is channels_last (torch 2.14).
    """
    few = narrow(wide, spread(wide.n, FEW)) if wide.n > FEW else wide
    alone = [
        batch_gradient(wide.model, wide.loss_fn, take(few.inputs, i), take(few.targets, i))
        for i in (slice(i, i + 1) for i in range(few.n))
    ]
    together = batch_gradient(wide.model, wide.loss_fn, few.inputs, few.targets)
    gaps = {name: (g - torch.stack([one[name] for one in alone]).sum(0)).norm() for name, g in together.items()}
    sizes = {name: torch.stack([one[name].norm() for one in alone]).sum() for name in together}
    worst = max(gaps, key=lambda name: float(gaps[name]))
    if gaps[worst] > SUMS * sum(sizes.values()):
        raise Unsupported(
            f"parameter `{worst}`: the gradients of {few.n} samples, one by one, add up to something else than that of "
            f"their batch, by {float(gaps[worst] / sizes[worst]):.1g} of it: a backward pass depends on the batch"
        )


def _refuse_random(wide: Problem, model: nn.Module, losses: Tensor) -> None:
    def run(seed: int) -> Tensor:
        return _losses(wide, model, wide.inputs, wide.targets, seed)

    if _differs(losses, run(seed=1)):
        where = first_difference(model, partial(run, 0), partial(run, 1), _differs) or "the model or its loss"
        raise Unsupported(
            f"{where} is random: two forward passes under different seeds differ; use eval(), or set its dropout to 0"
        )


def _refuse_coupled(wide: Problem, model: nn.Module, losses: Tensor) -> None:
    """Repeat sample i over the whole batch: everybody else changes, the loss of i may not."""

    def run(index: Tensor | slice) -> Tensor:
        return _losses(wide, model, take(wide.inputs, index), take(wide.targets, index))

    for i in {0, wide.n - 1}:
        index = torch.full((wide.n,), i, device=wide.device)
        alone = run(index)
        if _differs(losses[i], alone[i]):

            def differs(a: Tensor, b: Tensor, i: int = i) -> bool:
                same_form = a.shape == b.shape and a.dim() > 0 and a.shape[0] == wide.n
                return same_form and _differs(a[i], b[i])

            both = partial(run, slice(None)), partial(run, index)
            where = first_difference(model, *both, differs) or "the loss, or a function outside any module,"
            raise Unsupported(
                f"{where} mixes the samples of a batch: with the other samples changed, the loss of sample {i} changes "
                f"from {float(losses[i]):.6g} to {float(alone[i]):.6g}; no sample has a gradient of its own"
            )
        single = run(index[:1])
        if _differs(losses[i], single[0]):
            raise Unsupported(
                f"the model or its loss depends on how many samples are in a batch: alone, the loss of sample {i} is "
                f"{float(single[0]):.6g}, among {wide.n} it is {float(losses[i]):.6g}; do not divide by the batch size"
            )


def _losses(wide: Problem, model: nn.Module, inputs: Batch, targets: Tensor, seed: int = 0) -> Tensor:
    # gradients are on as in a backend's call: the model's forward pass may differentiate
    with seeded(model, seed), torch.enable_grad(), kept_buffers(model):
        with _blaming(lambda error: culprit(error, model)):
            outputs = call(model, inputs)
        with _blaming(lambda _: f"the loss {_name(wide.loss_fn)}"):
            losses: object = wide.loss_fn(outputs, targets)
    if not isinstance(losses, Tensor):
        wanted = f"a tensor [{size(inputs)}]: one loss a sample"
        raise Misfit(f"the loss {_name(wide.loss_fn)} returned {a_thing(losses)}, not {wanted}")
    return losses.detach()


@contextmanager
def _blaming(who: Callable[[Exception], str]) -> Iterator[None]:
    """Say of an error who raised it."""
    try:
        yield
    except Exception as error:
        what = f"{who(error)}: {type(error).__name__}: {first_line(error)} ({place_of(error)})"
        raise Misfit(f"model, loss and batch do not fit together: {what}") from error


def _name(loss_fn: LossFn) -> str:
    """Return a loss' name as its author wrote it."""
    function = loss_fn.func if isinstance(loss_fn, partial) else loss_fn
    return f"`{getattr(function, '__name__', type(function).__name__)}`"


def _differs(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
