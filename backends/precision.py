"""What may round products to less than their factors' dtype: autocast, and TF32 on CUDA.

TF32 has ten bits of mantissa; torch lets convolutions round to it by default. See
https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices. `allow_tf32`,
the older switch, raises where a program uses the newer one, `fp32_precision`; that one knows of both.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

_PRODUCTS: Any = torch.backends.cuda.matmul
_CUDNN: Any = torch.backends.cudnn
SWITCHES: tuple[Any, ...] = (_PRODUCTS, _CUDNN.conv, _CUDNN.rnn)


def tf32_in_products() -> bool:
    """Return whether products of matrices may be rounded."""
    return bool(_PRODUCTS.fp32_precision == "tf32")


def tf32_in_convolutions() -> bool:
    """Return whether convolutions may be."""
    return bool(_CUDNN.conv.fp32_precision == "tf32")


def tf32_allowed(like: Tensor) -> bool:
    """Return whether what is computed of tensors of this dtype, on this device, may be rounded."""
    return like.is_cuda and like.dtype == torch.float32 and (tf32_in_products() or tf32_in_convolutions())


@contextmanager
def without_tf32() -> Iterator[None]:
    """Allow no TF32 in the block; afterwards both kinds of switches are as they were, and may be read as before."""
    before = [switch.fp32_precision for switch in SWITCHES]
    older, words = _older(), _words()
    try:
        if older:
            _PRODUCTS.allow_tf32 = _CUDNN.allow_tf32 = False
        for switch in SWITCHES:
            if not older or switch.fp32_precision == "tf32":  # a more general switch says more than the older ones
                switch.fp32_precision = "ieee"
        yield
    finally:
        if older:
            _PRODUCTS.allow_tf32, _CUDNN.allow_tf32 = older
        for switch, was in zip(SWITCHES, before, strict=True):
            switch.fp32_precision = "none"  # what a more general switch says, now and later
            if switch.fp32_precision != was:
                switch.fp32_precision = was
        if words and _words() != words:
            torch.set_float32_matmul_precision(words)


def _older() -> tuple[bool, bool] | None:
    """Return the older switches, or None where the newer ones have been used: then the older may not be read."""
    try:
        return _PRODUCTS.allow_tf32, _CUDNN.allow_tf32
    except RuntimeError:
        return None


def _words() -> str | None:
    """Return how torch's oldest switch describes products, or None where that may not be read."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context without autocast on a device: in it, products are made in the dtype of what is multiplied."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def rounding(like: Tensor) -> float:
    """Return how far apart numbers near 1 are in the arithmetic of a tensor: its dtype's, or that of autocast."""
    device, dtype = like.device.type, like.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.finfo(dtype).eps
