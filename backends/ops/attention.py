"""Attention: `F.multi_head_attention_forward` shows its linear layers, and its core keeps the fused kernel.

Under vmap torch falls back to a core that holds all T² weights. One that sees the samples as further entries of the
batch axis, which attention always has, may use whatever kernel is there for an ordinary batch.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.ops.rules import OVER_THE_BATCH, UNDER_VMAP, rewrite


def _transparent(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of `torch.nn.functional` that asks no mode to take it over: then its inner calls ask."""
    assert isinstance(function, FunctionType)
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    clear = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    clear.__kwdefaults__ = function.__kwdefaults__
    return clear


rewrite(F.multi_head_attention_forward)(_transparent(F.multi_head_attention_forward))


class _Folded(torch.autograd.Function):
    """A function of tensors [B, ...] that leaves entries of B apart, called once on [N·B, ...] for N samples."""

    @staticmethod
    def forward(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:  # where nothing belongs to a sample
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, int]:  # noqa: ANN401
        batched = (
            t.expand(info.batch_size, *t.shape) if axis is None else t.movedim(axis, 0)
            for t, axis in zip(tensors, in_dims[1:], strict=True)
        )
        return function(*(t.flatten(0, 1) for t in batched)).unflatten(0, (info.batch_size, -1)), 0


@rewrite(F.scaled_dot_product_attention, watched=False, passes=[UNDER_VMAP])
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: float | bool | None,
) -> Any:  # noqa: ANN401  a Tensor, or NotImplemented
    """Return the attention of tensors that all have the same batch axis; others are left to torch."""
    tensors = [query, key, value, *([] if attn_mask is None else [attn_mask])]
    if query.dim() < 3 or any(t.dim() != query.dim() or len(t) != len(query) for t in tensors):
        return NotImplemented

    def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, **options)  # type: ignore[arg-type]

    return _Folded.apply(core, *tensors)


@rewrite(F.scaled_dot_product_attention, passes=[OVER_THE_BATCH])
def with_bias(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *others: Any,  # noqa: ANN401  dropout_p, is_causal
    scale: float | None = None,
    **options: Any,  # noqa: ANN401  these, or enable_gqa
) -> Any:  # noqa: ANN401  a Tensor, or NotImplemented
    """Add a learned mask, which all samples share, by an op that has a rule: a fused kernel would hide it."""
    if attn_mask is None or not attn_mask.requires_grad or any(others) or any(options.values()):
        return NotImplemented
    if attn_mask.dim() == query.dim() and len(attn_mask) > 1:
        return NotImplemented
    weights = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.mT
    weights = torch.add(weights, attn_mask)
    nowhere = (weights == -torch.inf).all(-1, keepdim=True)  # attention to nothing is zero
    return weights.masked_fill(nowhere, 0).softmax(-1).masked_fill(nowhere, 0) @ value
