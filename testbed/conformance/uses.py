"""How a model calls the layers of torch.nn that take more than one tensor, or return more: as [N, ...] -> [N, ...]."""

import warnings

import torch
from torch import Tensor, nn

from testbed.conformance.case import Forward, T


def call(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x)."""
    return layer(x)  # type: ignore[no-any-return]  # a module's call is untyped, here and below


def quietly(use: Forward) -> Forward:
    """Return `use` without torch's remarks that a kernel copies its input or has no oneDNN form: that is not news."""

    def quiet(layer: nn.Module, x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using padding='same' with even kernel|LSTM with projections is not")
            return use(layer, x)

    return quiet


def recurrent(layer: nn.RNNBase, x: Tensor, final: bool = False) -> Tensor:
    """Return outputs [N, T, H], or the final states [N, layers, H]."""
    outputs, last = layer(x if layer.batch_first else x.transpose(0, 1))
    if final:
        return torch.cat(last if isinstance(last, tuple) else [last], 2).transpose(0, 1)
    return outputs if layer.batch_first else outputs.transpose(0, 1)  # type: ignore[no-any-return]


def steps(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a cell's hidden state [..., H] after the positions of x [..., T, D], one at a time."""
    state = None
    for step in x.unbind(-2):
        state = layer(step, state)
    return state[0] if isinstance(state, tuple) else state  # type: ignore[return-value]  # there is a position


def attend(layer: nn.MultiheadAttention, x: Tensor, padded: Tensor | None = None, **options: bool | Tensor) -> Tensor:
    """Return attention [N, T, D] of x over its own first kdim, vdim features; unaveraged: the weights."""
    x = x if layer.batch_first else x.transpose(0, 1)
    y, weights = layer(x, x[..., : layer.kdim], x[..., : layer.vdim], key_padding_mask=padded, **options)
    if "average_attn_weights" in options:
        return weights  # type: ignore[no-any-return]
    return y if layer.batch_first else y.transpose(0, 1)  # type: ignore[no-any-return]


def transform(layer: nn.Module, x: Tensor, padded: Tensor | None = None, causal: str = "", pads: str = "") -> Tensor:
    """Return [N, T, D]; a second sequence is the first 3 positions; `causal` and `pads` name the masks' arguments."""
    masks = ({causal: later(x)} if causal else {}) | ({pads: padded} if pads else {})
    first = any(m.batch_first for m in layer.modules() if isinstance(m, nn.MultiheadAttention))
    x = x if first else x.transpose(0, 1)
    both = (x, x[:, :3] if first else x[:3])
    if isinstance(layer, nn.Transformer):
        y = layer(*reversed(both), **masks)
    else:
        y = layer(*both[: 1 + ("Decoder" in type(layer).__name__)], **masks)
    return y if first else y.transpose(0, 1)  # type: ignore[no-any-return]


def later(x: Tensor) -> Tensor:
    """Return the mask [T, T] of positions after one's own, of x [N, T, ...]."""
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)


def up(x: Tensor) -> Tensor:
    """Return the positions [T] of x [N, T, ...]."""
    return torch.arange(x.shape[1], device=x.device)


def in_bags(layer: nn.EmbeddingBag, x: Tensor, starts: tuple[int, ...] = ()) -> Tensor:
    """Return bags [N, ..., D] of tokens [N, T]: a bag a row, or by offsets, bags at each row's `starts`."""
    if not (starts or layer.include_last_offset):
        return call(layer, x)
    starts = starts or (0,)
    rows = torch.arange(0, x.numel(), x.shape[1], device=x.device)
    offsets = torch.stack([rows + s for s in starts], 1).flatten()
    end = offsets.new_full((int(layer.include_last_offset),), x.numel())
    return layer(x.flatten(), torch.cat([offsets, end])).unflatten(0, (-1, len(starts)))  # type: ignore[no-any-return]


def padded_positions(n: int) -> tuple[Tensor]:
    """Return a mask [n, T] of padded positions, different for each sample."""
    return (torch.arange(T) > torch.arange(n)[:, None] % T,)


def unbatched(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs of one call a sample, without batch axis."""
    ys = [layer(s) for s in x]
    return torch.stack([y[0] if isinstance(y, tuple) else y for y in ys])
