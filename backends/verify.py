"""What a library has computed, held against ordinary autograd: once for each form of inputs, since it costs passes."""

import torch
from torch import Tensor, nn

from backends import precision
from backends.base import LossFn, Named, Unsupported, full_copy, guarded
from backends.batch import Batch, cast, detached, size, take
from backends.probe import spread
from backends.running import batch_gradient, kept_random_state

SAMPLES = 4  # that are held against ordinary autograd, from the first to the last
NOISE = 16  # times what one is off by rounding that it may be off

OFF = 0.01
"""Relative to Σ_i ‖g_i‖, how far Σ_i g_i may be from the batch gradient: rounding is far below, lost uses above."""

RANDOM = 1e-3
"""Relative to it, how far a gradient may be from the same once more: nondeterminism is below, dropout is not."""


def few_of(samples: int) -> list[int]:
    """Return which samples are held against ordinary autograd."""
    found: list[int] = spread(samples, SAMPLES).unique().tolist()
    return found


def verify_rows(
    library: str,
    found: Named | Tensor,
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Batch,
    targets: Tensor,
    *,
    only_few: bool = False,
) -> None:
    """Hold a few samples' gradients, or norms, against those of each alone, by ordinary autograd.

    Of a random model that says nothing.

    Args:
        library: The library's name, for the reason.
        found: Gradients [N, *shape] by name, or norms [N].
        model: The caller's model.
        loss_fn: The loss.
        inputs: The batch.
        targets: Its targets.
        only_few: Whether `found` holds only the samples of `few_of`.

    Raises:
        Unsupported: One is off by more than `OFF`, and by more than rounding.
    """
    inputs, targets = detached(inputs), detached(targets)
    with precision.without_tf32():
        for place, i in enumerate(few_of(size(inputs))):
            row = place if only_few else i
            alone = take(inputs, slice(i, i + 1)), targets[i : i + 1]
            truth = _dense(batch_gradient(model, loss_fn, *alone))
            with kept_random_state(model):
                torch.rand(1, device=targets.device)
                again = _dense(batch_gradient(model, loss_fn, *alone))
            norm = distance(truth)
            if distance(truth, again) > RANDOM * norm:
                return
            if isinstance(found, Tensor):
                gap = abs(float(found[row]) - norm)
            else:
                gap = distance(truth, {name: found[name][row] for name in truth})
            # nonfinite gradients are not this check's business
            if gap > OFF * norm and gap > NOISE * _rounding(model, loss_fn, *alone, truth):
                what = "norm" if isinstance(found, Tensor) else "gradient"
                raise Unsupported(f"`model`: {library}'s {what} of sample {i} is not that of the sample alone")


def _rounding(model: nn.Module, loss_fn: LossFn, inputs: Batch, targets: Tensor, truth: Named) -> float:
    """Return how far a sample's gradient is off by rounding, as another dtype shows; 0 where none can be had."""
    dtype = next(iter(truth.values())).dtype
    other = torch.float32 if dtype == torch.float64 else torch.float64
    try:
        with precision.without_autocast(targets.device):
            loss = full_copy(loss_fn).to(other) if isinstance(loss_fn, nn.Module) else loss_fn
            found = _dense(batch_gradient(full_copy(model).to(other), loss, cast(inputs, other), cast(targets, other)))
    except Exception:  # a model or a loss may insist on its dtype
        return 0.0
    share = torch.finfo(dtype).eps / torch.finfo(other).eps if other == torch.float32 else 1.0
    return share * distance(truth, found)


def _dense(gradient: Named) -> Named:
    return {name: t.to_dense() for name, t in gradient.items()}


def distance(one: Named, other: Named | None = None) -> float:
    """Return the norm of a gradient, or of what it differs by from another one."""
    gaps = [t.double() if other is None else t.double() - other[name].double() for name, t in one.items()]
    return float(torch.stack([torch.linalg.vector_norm(gap) for gap in gaps]).norm())


def refuse_nonlinear(library: str, model: nn.Module, loss_fn: LossFn, inputs: Batch, targets: Tensor) -> None:
    """Refuse a model that sends half of a gradient back as something else than half of it, where losses are weighted.

    Raises:
        Unsupported: A function's own backward pass, or a hook on a tensor, is not linear: it clamps, say, or rounds.
    """
    whole = _dense(batch_gradient(model, loss_fn, inputs, targets))
    half = _dense(batch_gradient(model, lambda outputs, targets: loss_fn(outputs, targets) / 2, inputs, targets))
    for name, g in whole.items():
        if guarded() and distance({name: g}, {name: 2 * half[name]}) > OFF * distance({name: g}):
            raise Unsupported(
                f"parameter `{name}`: half of the losses has not half of its gradient, so a backward pass in the model "
                f"is not linear; {library} sends weighted losses back"
            )


def verify_gram(library: str, gram: Tensor, total: Named) -> None:
    """Hold a Gram matrix against the batch gradient: Σ_ij ⟨g_i, g_j⟩ is its squared norm.

    Raises:
        Unsupported: It is not, by more than `OFF` of (Σ_i ‖g_i‖)².
    """
    wide = gram.to(torch.promote_types(gram.dtype, torch.float32))
    scale = wide.diagonal().clamp(min=0).sqrt().sum().square()
    norms = [torch.linalg.vector_norm(t, dtype=wide.dtype) for t in total.values()]
    gap = (wide.sum() - torch.stack(norms).square().sum()).abs()
    if guarded() and bool(gap > OFF * scale):  # nonfinite gradients are not this check's business
        raise Unsupported(f"`model`: {library}'s Gram matrix does not sum to the batch gradient's squared norm")
