"""The Triton kernel against float64: on a GPU where there is one, else in Triton's interpreter, in another process."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from backends import get_backend
from backends.base import Unsupported
from backends.ops.choice import CHOSEN
from backends.ops.conv import Correlation, grouped
from tests.cases import DEVICE, Functional, linear, squares

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(not INTERPRETED and DEVICE.type != "cuda", reason="runs on CUDA, or in the interpreter")
N = 3


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# images a sample, channels, output channels, size, kernel, stride, padding, dilation, groups
GEOMETRIES = {
    "1d": (1, 3, 5, (9,), (3,), (2,), (1,), (1,), 1),
    "2d, all uneven, two images": (2, 4, 6, (9, 8), (3, 2), (2, 1), (1, 0), (1, 2), 1),
    "2d, groups": (1, 4, 6, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "3d": (1, 2, 3, (5, 6, 7), (2, 3, 2), (1, 2, 1), (0, 1, 1), (1, 1, 2), 1),
    "several tiles": (1, 20, 70, (5, 4), (3, 3), (1, 1), (1, 1), (1, 1), 1),
}


def correlation(name: str, dtype: torch.dtype) -> Correlation:
    images, c, p, size, kernel, stride, padding, dilation, groups = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(0)
    options = zip(size, kernel, stride, padding, dilation, strict=True)
    out = [(s + 2 * pad - d * (k - 1) - 1) // step + 1 for s, k, step, pad, d in options]
    x, y = (torch.randn(shape, generator=generator) for shape in ((N, images, c, *size), (N, images, p, *out)))
    shape = (p, c // groups, *kernel)
    return Correlation(x.to(DEVICE, dtype), y.to(DEVICE, dtype), shape, stride, padding, dilation, groups)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients_and_norms_of_convolutions_are_those_of_float64(name: str, dtype: torch.dtype) -> None:
    from backends.ops.conv import product_of

    form = correlation(name, dtype)
    exact = grouped(Correlation(form.x.double(), form.y.double(), *list(vars(form).values())[2:7]))
    rows, found = product_of(form).rows(), product_of(form).squares()
    share = 4 * torch.finfo(dtype).eps
    assert rows.dtype == dtype
    assert ((rows.double() - exact).flatten(1).norm(dim=1) <= share * exact.flatten(1).norm(dim=1)).all()
    assert (found.double() / exact.flatten(1).square().sum(1) - 1).abs().max() <= 1e-5  # whatever the inputs' dtype


@runs
def test_a_backend_that_asks_for_it_measures_it_and_is_right() -> None:
    conv = nn.Conv2d(2, 3, 3).to(DEVICE)
    model = Functional(lambda s, x: s.a(s.c(x[:, None].expand(-1, 2, -1, -1)).flatten(2)).sin(), c=conv, a=linear(9, 4))
    model.to(DEVICE, torch.float32)
    inputs, targets = torch.randn(N, 5, 5, device=DEVICE), torch.randn(N, device=DEVICE)
    for quantity in ("grads", "norms", "clipped_sum"):
        ours, loop = (
            getattr(get_backend(name, **options), quantity)(model, squares)
            for name, options in (("bookkeeping", {"triton": True}), ("naive", {}))
        )
        for _ in range(2):
            torch.testing.assert_close(ours(inputs, targets), loop(inputs, targets), rtol=1e-4, atol=1e-5)
    assert "weight 3×2×3×3" in "".join(CHOSEN)


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="this process runs them itself")
def test_it_is_right_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "11 passed" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("norms_alone", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_compiles_for_a_gpu_that_is_not_here(dtype: str, norms_alone: bool, precision: str) -> None:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from backends.ops.kernels import _product

    constants = {"SQUARES": norms_alone, "HEIGHT": 64, "WIDTH": 64, "DEPTH": 32, "PRECISION": precision}
    pointers = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "out_ptr": "*fp32" if norms_alone else f"*{dtype}"}
    tuples = {"x_stride": 6, "y_stride": 6, **dict.fromkeys(("size", "out_size", "kernel"), 3)}
    tuples |= dict.fromkeys(("stride", "padding", "dilation"), 3)
    kinds = {**pointers, **{name: ("i32",) * length for name, length in tuples.items()}}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in _product.arg_names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Triton about its own defaults
        made = compile(ASTSource(_product, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert made.metadata.shared < 2**16


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="there it is not refused")
def test_it_is_refused_where_it_cannot_run() -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(Unsupported, match=r"`model` \(triton=True\): it is on cpu; .* CUDA device"):
        get_backend("bookkeeping", triton=True).norms(model, squares)
