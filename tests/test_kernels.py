"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter, in another process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

from backends import get_backend
from backends.ops.choice import CHOSEN, kernels
from backends.ops.conv_ways import grouped
from backends.ops.correlation import Correlation
from backends.ops.outer import Outer
from tests.cases import DEVICE, Functional, linear, squares
from tests.precisions import INTERPRETED, N, runs, tf32

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("exact_float32")
FILES = [__file__, str(Path(__file__).with_name("test_gram_kernel.py"))]


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
def test_gradients_of_convolutions_and_norms_are_those_of_float64(name: str, dtype: torch.dtype) -> None:
    from backends.ops.conv_ways import product_of

    form = correlation(name, dtype)
    exact = grouped(Correlation(form.x.double(), form.y.double(), *list(vars(form).values())[2:7]))
    found = product_of(form).squares()
    assert (found.double() / exact.flatten(1).square().sum(1) - 1).abs().max() <= 1e-5  # whatever the inputs' dtype
    grads = product_of(form).grads()
    assert grads.dtype == dtype
    assert grads.shape == (N, *form.shape)
    assert (grads.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="TF32 is CUDA's")
@pytest.mark.parametrize("form", ["samples first", "positions last"])
def test_where_tf32_is_allowed_results_are_as_near_as_that(form: str) -> None:
    from backends.ops.conv_ways import product_of
    from backends.ops.kernels import squares_of_products

    left, right = (torch.randn(N, 70, width, device=DEVICE, dtype=torch.float32) for width in (150, 40))
    if form == "positions last":
        left, right = (t.mT.contiguous().mT for t in (left, right))
    products = (left.double().mT @ right.double()).flatten(1).square().sum(1)
    conv = correlation("several tiles", torch.float32)
    rows = grouped(Correlation(conv.x.double(), conv.y.double(), *list(vars(conv).values())[2:7]))
    with tf32(True):
        assert (squares_of_products(left, right).double() / products - 1).abs().max() <= 2**-8
        found = product_of(conv).squares().double()
    assert (found / rows.flatten(1).square().sum(1) - 1).abs().max() <= 2**-8


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])])
@pytest.mark.parametrize("form", ["samples first", "positions last", "one position"])
@pytest.mark.parametrize(("positions", "p", "d"), [(5, 3, 17), (70, 150, 40)])
def test_norms_of_products_are_those_of_float64(positions: int, p: int, d: int, form: str, dtype: torch.dtype) -> None:
    positions = 1 if form == "one position" else positions
    left, right = (torch.randn(N, positions, width).to(DEVICE, dtype) for width in (p, d))
    if form == "positions last":
        left, right = (t.mT.contiguous().mT for t in (left, right))
    exact = (left.double().mT @ right.double()).flatten(1).square().sum(1)
    found = Outer(left, right).squares_fused()
    assert found.dtype == torch.float32
    assert (found.double() / exact - 1).abs().max() <= 1e-6


@runs
@pytest.mark.parametrize("name", [name for name, geometry in GEOMETRIES.items() if geometry[-1] == 1])
def test_norms_by_patches_are_those_of_float64(name: str) -> None:
    form = correlation(name, torch.float32)
    exact = grouped(Correlation(form.x.double(), form.y.double(), *list(vars(form).values())[2:7]))
    on_patches = (partial(form.squares_by_patches, way) for way in (Outer.squares_fused, Outer.squares_by_gram_fused))
    for way in (*on_patches, form.squares_by_gram_fused):
        assert (way().double() / exact.flatten(1).square().sum(1) - 1).abs().max() <= 1e-6


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("p", "d"), [(3, 17), (40, 1500)])
def test_outer_products_are_those_of_torch(p: int, d: int, dtype: torch.dtype) -> None:
    from backends.ops.kernels import outer_products

    left, right = torch.randn(p, N).to(DEVICE, dtype).mT, torch.randn(N, d).to(DEVICE, dtype)
    out = torch.full((N, p, d), torch.nan, device=DEVICE, dtype=dtype)
    assert outer_products(left, right, out) is out
    assert torch.equal(out, left[:, :, None] * right[:, None])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter warns of infinity times a tile's zeros")
def test_infinity_is_no_number_that_could_be_clipped_by() -> None:
    from backends.ops.kernels import squares_of_products

    left = torch.tensor([[[1.0]], [[torch.inf]], [[torch.nan]]], device=DEVICE)
    found = squares_of_products(left, torch.ones_like(left))
    assert found.isfinite().tolist() == [True, False, False]


@runs
def test_a_backend_measures_them_and_is_right() -> None:
    conv = nn.Conv2d(2, 3, 3).to(DEVICE)
    model = Functional(lambda s, x: s.a(s.c(x[:, None].expand(-1, 2, -1, -1)).flatten(2)).sin(), c=conv, a=linear(9, 4))
    model.to(DEVICE, torch.float32)
    inputs, targets = torch.randn(N, 5, 5, device=DEVICE), torch.randn(N, device=DEVICE)
    for quantity in ("grads", "norms", "clipped_sum"):
        ours, loop = (
            getattr(get_backend(name, **options), quantity)(model, squares)
            for name, options in (("bookkeeping", {}), ("naive", {}))
        )
        for _ in range(2):
            torch.testing.assert_close(ours(inputs, targets), loop(inputs, targets), rtol=1e-4, atol=1e-5)
    assert "weight 3×2×3×3" in "".join(CHOSEN)


@runs
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ""),
        ({"unchecked_kernels": True}, ", unchecked kernels too"),
        ({"triton": False}, ", without kernels"),
        ({"triton": False, "unchecked_kernels": True}, ", without kernels"),
    ],
)
def test_options_say_which_kernels_are_measured(
    options: dict[str, bool], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, str] = {}
    monkeypatch.setattr("backends.ops.choice.CHOSEN", chosen)
    monkeypatch.setattr("backends.ops.choice._RANKED", {})
    model = nn.Linear(120, 140, dtype=torch.float32, device=DEVICE)
    loss = lambda outputs, targets: outputs.square().sum((1, 2))  # noqa: E731
    norms = get_backend("bookkeeping", **options).norms(model, loss)
    norms(torch.randn(3, 7, 120, dtype=torch.float32, device=DEVICE), torch.zeros(3, device=DEVICE))
    (found,) = (what for what in chosen if what.startswith("norms of 7 products"))
    assert found.split("samples or more")[1] == said


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="this process runs them itself")
@pytest.mark.skipif(
    TorchVersion(triton.__version__) < (3, 7) and TorchVersion(numpy.__version__) >= (2, 4),
    reason="the interpreter of Triton 3.6 takes an array for an index, which NumPy 2.4 forbids",
)
def test_it_is_right_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *FILES]
    command += ["-W", "ignore:Conversion of an array:DeprecationWarning"]  # Triton 3.6's own, before NumPy 2.4
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "79 passed" in done.stdout


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="there they are measured")
def test_they_are_not_measured_on_a_cpu() -> None:
    before = set(CHOSEN)
    model = nn.Linear(120, 140, dtype=torch.float32)
    loss = lambda outputs, targets: outputs.square().sum((1, 2))  # noqa: E731
    get_backend("bookkeeping").norms(model, loss)(torch.randn(3, 7, 120, dtype=torch.float32), torch.zeros(3))
    (measured,) = (key for key in set(CHOSEN) - before if "products" in key)
    assert CHOSEN[measured] in ("direct", "gram")


@pytest.mark.skipif(not INTERPRETED, reason="only there bfloat16 is multiplied as if its bits were whole numbers")
def test_where_a_kernel_is_wrong_it_is_left_out() -> None:
    left, right = (torch.randn(N, 7, size).bfloat16() for size in (5, 21))
    with kernels("checked"):
        squares = Outer(left, right).squares()
    exact = (left.double().mT @ right.double()).square().sum((1, 2))
    assert (squares.double() / exact - 1).abs().max() <= 2**-8
    assert "(fused is off by" in CHOSEN["norms of 7 products 5×21, bfloat16, cpu, 2 samples or more"]


def far(t: torch.Tensor) -> torch.Tensor:
    """Return the same numbers, of whose samples some are 2³¹ numbers from the first, in memory that is not touched."""
    memory = torch.empty(2**31 + 2**20, dtype=t.dtype, device="cpu")
    apart = memory.as_strided(t.shape, (t.stride(0), 2**30, *t.stride()[2:]))
    return apart.copy_(t)


@pytest.mark.skipif(not INTERPRETED, reason="memory that is not touched is there on Linux, on a CPU")
def test_numbers_of_a_sample_may_be_far_apart() -> None:
    from backends.ops.kernels import squares_of_products

    left, right = (torch.randn(2, 3, 16).half() for _ in range(2))
    assert torch.equal(squares_of_products(far(left), right), squares_of_products(left, right))
    assert torch.equal(squares_of_products(left, far(right)), squares_of_products(left, right))


def test_a_sample_that_is_too_large_for_a_kernel_is_refused() -> None:
    from backends.ops.kernels import within_reach

    with pytest.raises(ValueError, match="a sample of 2147483648 numbers is too large for a kernel; at most"):
        within_reach(torch.empty(1, device="meta").expand(2, 2**16, 2**15).contiguous())
