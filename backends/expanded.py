"""What PyTorch's ExpandedWeights take the samples to be, and get wrong; for each library that computes with them."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from backends.rows import Rows, batch_first, tensors_in

RECURRENT = (torch.rnn_tanh, torch.rnn_relu, torch.lstm, torch.gru)


def expanded(function: Any, args: Any, result: Any) -> tuple[list[Rows], list[Rows]]:  # noqa: ANN401
    """Return where ExpandedWeights take the samples to be in what a function is given and what it returns.

    On the first axis of the first tensor; in recurrent layers where `batch_first` says; in packed sequences in the
    order that they were sorted in, which need not be the batch's.
    """
    from torch.nn.utils._expanded_weights import ExpandedWeight  # private: needed by those that compute with it only

    if function not in ExpandedWeight.handled_functions and function not in RECURRENT:
        return [], []  # then it raises
    if function not in RECURRENT:
        rows = batch_first(function, args, result)
        return rows[0][:1], rows[1]
    packed = not isinstance(args[2], list)  # then the second argument holds the batch's size at each step
    steps = torch.cat([torch.arange(n, device="cpu") for n in args[1]]) if packed else None
    axis = 0 if packed or args[-1] else 1
    first, *states = tensors_in(result)
    return [Rows(args[0], axis, steps)], [Rows(first, axis, steps), *(Rows(state, 1) for state in states)]


def trains_padding(layer: nn.Module) -> str | None:
    """Case "Embedding(padding_idx=0)"."""
    padded = isinstance(layer, nn.Embedding) and layer.padding_idx is not None
    return "the padding would get a gradient" if padded else None


def normalises_anew(layer: nn.Module) -> str | None:
    """Case "InstanceNorm2d running statistics, in eval mode"."""
    running = isinstance(layer, _InstanceNorm) and layer.track_running_stats and not layer.training
    return "the backward pass would take the input's statistics, not the running ones" if running else None
