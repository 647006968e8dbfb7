"""Attention: what `F.multi_head_attention_forward` does is made visible."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F

from backends.ops.rules import rewrite


def _transparent(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of `torch.nn.functional` that asks no mode to take it over: then its inner calls ask."""
    assert isinstance(function, FunctionType)
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    clear = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    clear.__kwdefaults__ = function.__kwdefaults__
    return clear


rewrite(F.multi_head_attention_forward)(_transparent(F.multi_head_attention_forward))
