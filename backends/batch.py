"""A batch: a tensor, or a tuple or dict of tensors, each with the samples on its first axis."""

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

Batch: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
Index: TypeAlias = slice | Tensor

B = TypeVar("B", bound=Batch)


def tensors(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch."""
    if isinstance(batch, Tensor):
        return [batch]
    return list(batch.values() if isinstance(batch, dict) else batch)


def size(batch: Batch) -> int:
    """Return N, the number of samples.

    Raises:
        ValueError: The batch holds no tensor, something else than tensors, tensors of different lengths, or no sample.
    """
    if isinstance(batch, Tensor) and batch.dim() > 0 and batch.shape[0] > 0:
        return batch.shape[0]  # asked a dozen times a call
    found = tensors(batch) if isinstance(batch, Tensor | tuple | list | dict) else []
    if not found or not all(isinstance(t, Tensor) and t.dim() > 0 for t in found):
        of = f" of {', '.join(type(t).__name__ for t in found)}" if found and not isinstance(batch, Tensor) else ""
        raise ValueError(f"a batch is a tensor [N, ...] or a tuple or dict of such, found {type(batch).__name__}{of}")
    lengths = {t.shape[0] for t in found}
    if len(lengths) > 1:
        raise ValueError(f"all tensors of a batch have the same first dimension N, found {sorted(lengths)}")
    if lengths == {0}:
        raise ValueError("a batch holds at least one sample, found none")
    return lengths.pop()


def apply(function: Callable[[Tensor], Tensor], batch: B) -> B:
    """Return the batch with `function` applied to each of its tensors."""
    if isinstance(batch, Tensor):
        return function(batch)  # type: ignore[return-value]  # Tensor is B here
    if isinstance(batch, dict):
        return {key: function(t) for key, t in batch.items()}  # type: ignore[return-value]
    return tuple(function(t) for t in batch)  # type: ignore[return-value]


def take(batch: B, index: Index) -> B:
    """Return the samples that `index` (a slice or a tensor of indices) picks, as a batch."""
    return apply(lambda t: t[index], batch)


def cast(batch: B, dtype: torch.dtype) -> B:
    """Return the batch with its floating-point tensors in `dtype`; indices and masks stay as they are."""
    return apply(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


def detached(batch: B) -> B:
    """Return the batch without a gradient of its own, which nobody asks for: the caller's `.grad` stays as it was."""
    return apply(torch.detach, batch) if any(t.requires_grad for t in tensors(batch)) else batch


def signature(batch: Batch) -> tuple[object, ...]:
    """Return what a batch looks like apart from N and its values: names, shapes and dtypes of its tensors."""
    names = tuple(batch) if isinstance(batch, dict) else ()
    return (names, *((tuple(t.shape[1:]), t.dtype) for t in tensors(batch)))


def form(inputs: Batch, targets: Tensor) -> tuple[object, ...]:
    """Return all of a call that is not values: what is recorded, or compiled, for one call holds for those alike."""
    device = targets.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return signature(inputs), size(inputs), signature(targets), autocast


def call(model: nn.Module | Callable[..., Tensor], inputs: Batch) -> Tensor:
    """Return `model(x)`, `model(*x)` or `model(**x)`, whichever the form of the inputs asks for."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)
