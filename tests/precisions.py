"""How exactly the Triton kernels are asked to multiply, and where they run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from backends.ops.correlation import Correlation
from tests.cases import DEVICE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(not INTERPRETED and DEVICE.type != "cuda", reason="runs on CUDA, or in the interpreter")
N = 3


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow TF32 or not in the block; torch allows it in convolutions by default."""
    places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = allowed
    yield
    for place, was in zip(places, before, strict=True):
        place.allow_tf32 = was


def convolution(dtype: torch.dtype, computed: torch.dtype | None = None) -> Correlation:
    """Return a convolution whose norms cancel in the Gram form, for the first sample only.

    Args:
        dtype: What images and gradients are rounded to.
        computed: What they are then given in.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 1, 8, 10, 9, generator=generator, dtype=torch.float32)
    y = torch.randn(N, 1, 64, 8, 7, generator=generator, dtype=torch.float32)
    x[0] = 1 + 1e-2 * x[0]
    y[0] -= y[0].mean((-2, -1), keepdim=True)
    x, y = (t.to(DEVICE, dtype).to(computed or dtype) for t in (x, y))
    return Correlation(x, y, (64, 8, 3, 3), (1, 1), (0, 0), (1, 1), 1)
