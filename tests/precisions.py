"""How exactly the Triton kernels are asked to multiply, and where they run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

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
