"""The Triton kernels against float64: on a GPU where there is one, else in Triton's interpreter, in another process."""

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from backends import get_backend
from backends.ops.choice import CHOSEN, fastest, kernels
from backends.ops.conv import Correlation, grouped
from backends.ops.live import peak
from backends.ops.outer import Outer
from tests.cases import DEVICE, Functional, linear, squares

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(not INTERPRETED and DEVICE.type != "cuda", reason="runs on CUDA, or in the interpreter")
N = 3


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


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


@pytest.fixture(autouse=True)
def _float32_is_exact() -> Iterator[None]:
    with tf32(False):
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
    from backends.ops.conv import product_of

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
    from backends.ops.conv import product_of
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


def where_the_gram_form_cancels(widths: tuple[int, int] = (24, 40)) -> tuple[Tensor, Tensor]:
    """Return vectors that have hardly a sum, and others that hardly differ."""
    left, right = (torch.randn(N, 70, width, device=DEVICE) for width in widths)
    return left - left.mean(1, keepdim=True), 1 + 1e-2 * right


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])])
@pytest.mark.parametrize("form", ["samples first", "positions last"])
@pytest.mark.parametrize(("positions", "p", "d"), [(5, 3, 17), (70, 150, 40), (150, 16, 20)])
def test_norms_by_the_gram_form_are_those_of_float64(
    positions: int, p: int, d: int, form: str, dtype: torch.dtype
) -> None:
    left, right = (torch.randn(N, positions, width).to(DEVICE, dtype) for width in (p, d))
    if form == "positions last":
        left, right = (t.mT.contiguous().mT for t in (left, right))
    exact = (left.double().mT @ right.double()).flatten(1).square().sum(1)
    for by_kernel in (False, True):
        found = Outer(left, right).squares_by_gram_fused(by_kernel)
        assert found.dtype == torch.float32
        assert (found.double() / exact - 1).abs().max() <= 1e-6


@runs
@pytest.mark.parametrize("widths", [(24, 40), (40, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_where_the_gram_form_cancels_it_is_not_taken(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    from backends.ops.gram_kernel import squares_by_gram

    left, right = (t.to(dtype) for t in where_the_gram_form_cancels(widths))
    exact = (left.double().mT @ right.double()).flatten(1).square().sum(1)
    for by_kernel in (False, True):
        cancelled = squares_by_gram(left, right, allowed=torch.inf, by_kernel=by_kernel)
        assert (cancelled.double() / exact - 1).abs().max() > 5e-5
        found = Outer(left, right).squares_by_gram_fused(by_kernel)
        assert (found.double() / exact - 1).abs().max() <= 1e-5


@runs
@pytest.mark.parametrize("widths", [(24, 40), (40, 24)])
@pytest.mark.parametrize("by_kernel", [False, True])
def test_the_estimate_is_what_the_formula_says(by_kernel: bool, widths: tuple[int, int]) -> None:
    from backends.ops.gram_kernel import squares_by_gram
    from backends.ops.kernels import squares_of_products

    left, right = (t[:1] for t in where_the_gram_form_cancels(widths))
    inner = [t[0].double() @ t[0].double().mT for t in (left, right)]
    lengths = [t.diagonal().sqrt()[:, None] * t.diagonal().sqrt() for t in inner]
    off = [lengths[k] * inner[1 - k] * 2.0**-24 * widths[k] ** 0.5 for k in (0, 1)]
    error = (
        (2 * (off[0].square() + off[1].square()).triu(1)).sum() * 2 + (off[0].square() + off[1].square()).trace()
    ).sqrt()
    estimate = float(error / (inner[0] * inner[1]).sum())
    product, by_gram = squares_of_products(left, right), squares_by_gram(left, right, torch.inf, by_kernel)
    assert (product / by_gram - 1).abs() > 5e-5
    assert torch.equal(squares_by_gram(left, right, 1.01 * estimate, by_kernel), by_gram)
    assert (squares_by_gram(left, right, 0.99 * estimate, by_kernel) / product - 1).abs() <= 1e-6


@runs
def test_samples_are_in_doubt_each_for_itself() -> None:
    from backends.ops.gram_kernel import squares_by_gram
    from backends.ops.kernels import squares_of_products

    left, right = where_the_gram_form_cancels()
    left[1], right[1] = torch.randn_like(left[1]), torch.randn_like(right[1])
    found, product = squares_by_gram(left, right, 2.0**-17), squares_of_products(left, right)
    assert ((found / product - 1).abs() <= 1e-6).all()
    by_gram = squares_by_gram(left, right, torch.inf)
    assert (found == by_gram).tolist() == [False, True, False]


@runs
@pytest.mark.parametrize("value", [0.0, 1e-21, *([] if INTERPRETED else [1e-30, torch.inf, torch.nan])])
def test_what_float32_cannot_bear_is_in_doubt(value: float) -> None:
    """Inner products of small vectors are zeros, with no error to be seen, though others make up for their size."""
    left, right = torch.randn(N, 20, 8, device=DEVICE), torch.randn(N, 20, 4, device=DEVICE)
    left[1] *= value
    right[1] *= min(1e18, 1e-3 / value) if 0 < value < 1 else 1
    exact = (left.double().mT @ right.double()).flatten(1).square().sum(1)
    found = Outer(left, right).squares_by_gram_fused().double()
    assert found.isfinite().tolist() == exact.isfinite().tolist()
    assert ((found - exact).abs() <= 1e-5 * exact)[exact.isfinite()].all()


@runs
@pytest.mark.parametrize("name", [name for name, geometry in GEOMETRIES.items() if geometry[-1] == 1])
def test_norms_by_patches_are_those_of_float64(name: str) -> None:
    form = correlation(name, torch.float32)
    exact = grouped(Correlation(form.x.double(), form.y.double(), *list(vars(form).values())[2:7]))
    for way in (Outer.squares_fused, Outer.squares_by_gram_fused):
        assert (form.squares_by_patches(way).double() / exact.flatten(1).square().sum(1) - 1).abs().max() <= 1e-6


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


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="this process runs them itself")
@pytest.mark.skipif(
    TorchVersion(triton.__version__) < (3, 7) and TorchVersion(numpy.__version__) >= (2, 4),
    reason="the interpreter of Triton 3.6 takes an array for an index, which NumPy 2.4 forbids",
)
def test_it_is_right_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    command += ["-W", "ignore:Conversion of an array:DeprecationWarning"]  # Triton 3.6's own, before NumPy 2.4
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "70 passed" in done.stdout


def compiled(kernel: Any, constants: dict[str, Any], kinds: dict[str, Any]) -> Any:
    """Return a kernel compiled for an H100, which need not be here."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Triton about its own defaults
        return compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(("dtype", "precision"), [("fp32", "bf16x6"), ("fp32", "tf32"), ("bf16", "ieee")])
def test_convolutions_compile_for_a_gpu_that_is_not_here(dtype: str, precision: str, write: bool) -> None:
    from backends.ops.conv_kernel import _product

    constants = {"HEIGHT": 64, "WIDTH": 64, "DEPTH": 32, "PRECISION": precision, "WRITE": write}
    pointers = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "out_ptr": f"*{dtype}" if write else "*fp32"}
    tuples = {"x_stride": 6, "y_stride": 6, **dict.fromkeys(("size", "out_size", "kernel"), 3)}
    tuples |= dict.fromkeys(("stride", "padding", "dilation"), 3)
    kinds = {**pointers, **{name: ("i32",) * length for name, length in tuples.items()}}
    assert compiled(_product, constants, kinds).metadata.shared < 2**16


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("dtype", "precision"), [("fp32", "bf16x6"), ("fp32", "bf16x3"), ("fp32", "tf32"), ("bf16", "ieee")]
)
def test_products_compile_for_a_gpu_that_is_not_here(dtype: str, precision: str) -> None:
    from backends.ops.kernels import _squares

    constants = {"HEIGHT": 64, "WIDTH": 64, "DEPTH": 32, "PRECISION": precision}
    kinds = {
        "left_ptr": f"*{dtype}",
        "right_ptr": f"*{dtype}",
        "out_ptr": "*fp32",
        "known_ptr": "*fp64",
        "allowed": "fp32",
    }
    kinds |= dict.fromkeys(("left_stride", "right_stride"), ("i32",) * 3)
    for one_tile in ({}, {"down": 1, "across": 1}):  # Triton makes a constant of 1
        for known in (0, 4):
            made = compiled(_squares, constants | one_tile | {"KNOWN": known}, kinds)
            assert "wgmma" in made.asm["ptx"]  # by tensor cores


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_sums_of_inner_products_compile_for_a_gpu_that_is_not_here() -> None:
    from backends.ops.gram_kernel import _sums

    kinds = {"lefts_ptr": "*fp32", "rights_ptr": "*fp32", "out_ptr": "*fp64"}
    kinds |= dict.fromkeys(("left_roundings", "right_roundings"), "fp32")
    for one_block in ({}, {"blocks": 1}):  # Triton makes a constant of 1
        assert compiled(_sums, {"ROWS": 16, "COLUMNS": 64, "SMALLEST": 1.0} | one_block, kinds).metadata.shared < 2**16


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("dtype", "precision"), [("fp32", "bf16x6"), ("bf16", "ieee")])
def test_inner_products_compile_for_a_gpu_that_is_not_here(dtype: str, precision: str) -> None:
    from backends.ops.gram_kernel import _upper

    kinds = {"left_ptr": f"*{dtype}", "right_ptr": f"*{dtype}", "lefts_ptr": "*fp32", "rights_ptr": "*fp32"}
    kinds |= dict.fromkeys(("left_stride", "right_stride"), ("i32",) * 3)
    for one_tile in ({}, {"tiles": 1}):  # Triton makes a constant of 1
        made = compiled(_upper, {"SIZE": 64, "DEPTH": 32, "PRECISION": precision} | one_tile, kinds)
        assert "wgmma" in made.asm["ptx"]  # by tensor cores


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_outer_products_compile_for_a_gpu_that_is_not_here(dtype: str) -> None:
    from backends.ops.kernels import _outer

    kinds = {**dict.fromkeys(("left_ptr", "right_ptr", "out_ptr"), f"*{dtype}")}
    kinds |= dict.fromkeys(("left_stride", "right_stride"), ("i32",) * 2)
    assert compiled(_outer, {"HEIGHT": 8, "WIDTH": 1024}, kinds).metadata.shared < 2**16


@pytest.mark.skipif(INTERPRETED or DEVICE.type == "cuda", reason="there they are measured")
def test_they_are_not_measured_on_a_cpu() -> None:
    before = set(CHOSEN)
    model = nn.Linear(120, 140, dtype=torch.float32)
    loss = lambda outputs, targets: outputs.square().sum((1, 2))  # noqa: E731
    get_backend("bookkeeping").norms(model, loss)(torch.randn(3, 7, 120, dtype=torch.float32), torch.zeros(3))
    (measured,) = (key for key in set(CHOSEN) - before if "products" in key)
    assert CHOSEN[measured] in ("direct", "gram")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("Failed to find C compiler.\nPlease specify via CC."),
            "does not run: Failed to find C compiler.",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), "needs more memory than there is to be compared"),
    ],
)
def test_a_kernel_that_does_not_run_is_not_the_fastest_and_that_is_said(
    error: RuntimeError, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> torch.Tensor:
        raise error

    monkeypatch.setattr("backends.ops.choice.with_kernels", lambda like: True)
    like, what = torch.zeros(1), f"a kernel with {type(error).__name__}"
    for _ in range(2):
        assert fastest({"direct": lambda: like}, what, 1, like, {"kernel": broken}) is like
    (found,) = (CHOSEN.pop(key) for key in list(CHOSEN) if key.startswith(what))
    assert found == f"direct (kernel {said})"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t * (1 + 1e-6), ""),  # a few roundings
        (lambda t: t * 1.01, " (kernel is off by 5.0e-02 where the norm is 5.0e+00)"),
        (lambda t: t.roll(1), " (kernel is off by inf where the norm is 5.0e+00)"),
        (lambda t: t * torch.nan, " (kernel is off by nan where the norm is 5.0e+00)"),
    ],
    ids=["rounded", "scaled", "permuted", "nan"],
)
def test_a_kernel_that_is_wrong_is_not_the_fastest_and_that_is_said(
    change: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.ops.choice.with_kernels", lambda like: True)
    right = torch.tensor([4.0, torch.inf, -3.0], dtype=torch.float32)  # infinity is no number to compare with

    def slow() -> torch.Tensor:
        time.sleep(0.01)
        return right

    what = f"a kernel{said}"
    found = fastest({"slow": slow}, what, 1, right, {"kernel": lambda: change(right)})
    (chosen,) = (CHOSEN.pop(key) for key in list(CHOSEN) if key.startswith(f"{what}, "))
    assert chosen == (f"slow{said}" if said else "kernel")
    assert torch.equal(found, right) == bool(said)


def test_a_wrong_kernel_is_noticed_where_it_writes_to_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backends.ops.choice.with_kernels", lambda like: True)
    out = torch.zeros(3, dtype=torch.float32)
    fastest({"direct": lambda: out.fill_(2)}, "one memory", 1, out, {"kernel": lambda: out.fill_(3)})
    (chosen,) = (CHOSEN.pop(key) for key in list(CHOSEN) if key.startswith("one memory"))
    assert chosen == "direct (kernel is off by 1.7e+00 where the norm is 3.5e+00)"
    assert out.tolist() == [2, 2, 2]


@pytest.mark.parametrize("sample", [0, 1, 4, 7])
def test_a_kernels_result_is_compared_at_both_ends_where_it_is_large(
    sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be no room for it a second time."""
    monkeypatch.setattr("backends.ops.choice.with_kernels", lambda like: True)
    monkeypatch.setattr("backends.ops.choice.COMPARED", 2 * 4000)

    def made(wrong: float) -> torch.Tensor:
        result = torch.ones(8, 1000)
        result[sample] = wrong
        return result

    ways, what = {"direct": lambda: made(1)}, f"sample {sample}"
    taken = peak(lambda: fastest(ways, what, 8, torch.ones(1), {"kernel": lambda: made(2)}))
    (chosen,) = (CHOSEN.pop(key) for key in list(CHOSEN) if key.startswith(what))
    assert ("kernel is off" in chosen) == (sample in (0, 1, 7))
    assert taken < 8 * 4000 * 3


@pytest.mark.skipif(not INTERPRETED, reason="only there bfloat16 is multiplied as if its bits were whole numbers")
def test_where_a_kernel_is_wrong_it_is_left_out() -> None:
    left, right = (torch.randn(N, 7, size).bfloat16() for size in (5, 21))
    with kernels(True):
        squares = Outer(left, right).squares()
    exact = (left.double().mT @ right.double()).square().sum((1, 2))
    assert (squares.double() / exact - 1).abs().max() <= 2**-8
    assert "(fused is off by" in CHOSEN["norms of 7 products 5×21, bfloat16, cpu, 2 samples or more"]


def test_another_way_that_fails_is_not_hidden() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        fastest({"direct": lambda: torch.zeros(1), "other": broken}, "a broken way", 1, torch.zeros(1))


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


def test_more_vectors_than_inner_products_can_be_counted_are_refused() -> None:
    from backends.ops.gram_kernel import squares_by_gram

    vectors = torch.empty(1, 2**16, 1, device="meta", dtype=torch.float32)
    with pytest.raises(ValueError, match="65536 vectors of a sample are too many for a kernel; at most 46340"):
        squares_by_gram(vectors, vectors, 1.0)
