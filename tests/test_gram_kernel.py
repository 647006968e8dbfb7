"""Norms in the Gram form by Triton kernels, and the estimate of their rounding; run as `test_kernels.py` is."""

import re
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.ops import persample
from backends.ops.choice import Kernels, kernels
from backends.ops.conv_ways import grouped, product_of
from backends.ops.outer import Outer, shows
from tests.cases import DEVICE
from tests.precisions import INTERPRETED, N, convolution, runs

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("exact_float32", "own_random_state")
BOTH = list(product((False, True), repeat=2))
CHECKED = {"gram, fused", "half of gram, fused"}
UNCHECKED = {"gram, few programs", "half of gram, few programs"}
ON_PATCHES = {"patches, fused", "patches, gram, fused"}


def where_the_gram_form_cancels(widths: tuple[int, int] = (24, 40)) -> tuple[Tensor, Tensor]:
    """Return vectors that have hardly a sum, and others that hardly differ."""
    left, right = (torch.randn(N, 70, width).to(DEVICE) for width in widths)
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
    for by_kernel, few in BOTH:
        found = Outer(left, right).squares_by_gram_fused(by_kernel, few=few)
        assert found.dtype == torch.float32
        assert (found.double() / exact - 1).abs().max() <= 1e-6


@runs
@pytest.mark.parametrize("widths", [(24, 40), (40, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_where_the_gram_form_cancels_it_is_not_taken(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    from backends.ops.gram_kernel import squares_by_gram

    left, right = (t.to(dtype) for t in where_the_gram_form_cancels(widths))
    exact = (left.double().mT @ right.double()).flatten(1).square().sum(1)
    for by_kernel, few in BOTH:
        cancelled = squares_by_gram(left, right, torch.inf, by_kernel, few)
        assert (cancelled.double() / exact - 1).abs().max() > 5e-5
        found = Outer(left, right).squares_by_gram_fused(by_kernel, few=few)
        assert (found.double() / exact - 1).abs().max() <= 1e-5


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_of_convolutions_are_in_doubt_each_for_itself(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first sample's image hardly differs from a constant, and its gradient has hardly a sum."""
    form = convolution(dtype)
    exact = grouped(convolution(dtype, torch.float64)).flatten(1).square().sum(1)
    gaps = {}
    for allowed in (torch.inf, shows(form.like)):
        with monkeypatch.context() as patch:
            patch.setattr("backends.ops.correlation.shows", lambda like, allowed=allowed: allowed)
            gaps[allowed] = (form.squares_by_gram_fused().double() / exact - 1).abs()
    cancelled, kept = gaps.values()
    assert cancelled[0] > 5e-5
    assert kept[0] <= 1e-5
    assert torch.equal(kept[1:], cancelled[1:])
    assert kept.max() <= 1e-5
    monkeypatch.setitem(persample.AT_A_TIME, DEVICE.type, 1)
    assert (form.squares_by_gram_fused().double() / exact - 1).abs().max() <= 1e-5


@runs
@pytest.mark.parametrize("widths", [(24, 40), (40, 24)])
@pytest.mark.parametrize(("by_kernel", "few"), BOTH)
def test_the_estimate_is_what_the_formula_says(by_kernel: bool, few: bool, widths: tuple[int, int]) -> None:
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
    product, by_gram = squares_of_products(left, right), squares_by_gram(left, right, torch.inf, by_kernel, few)
    assert (product / by_gram - 1).abs() > 5e-5
    assert torch.equal(squares_by_gram(left, right, 1.01 * estimate, by_kernel, few), by_gram)
    assert (squares_by_gram(left, right, 0.99 * estimate, by_kernel, few) / product - 1).abs() <= 1e-6


@runs
@pytest.mark.parametrize("few", [False, True])
def test_samples_are_in_doubt_each_for_itself(few: bool) -> None:
    from backends.ops.gram_kernel import squares_by_gram
    from backends.ops.kernels import squares_of_products

    left, right = where_the_gram_form_cancels()
    left[1], right[1] = (torch.randn(t.shape[1:]).to(DEVICE) for t in (left, right))
    found, product = squares_by_gram(left, right, 2.0**-17, few=few), squares_of_products(left, right)
    assert ((found / product - 1).abs() <= 1e-6).all()
    by_gram = squares_by_gram(left, right, torch.inf)
    assert (found == by_gram).tolist() == [False, True, False]


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norms_of_convolutions_are_measured_in_the_gram_form(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision is added on tensor cores, which cut off: its estimate is the larger one."""
    from backends.ops import gram_kernel

    ranked: dict[tuple[str, torch.device], list[str]] = {}
    monkeypatch.setattr("backends.ops.choice._RANKED", ranked)
    rounded: list[bool] = []
    estimated = gram_kernel.sums_and_errors
    monkeypatch.setattr(gram_kernel, "sums_and_errors", lambda *a: rounded.append(a[-1]) or estimated(*a))
    with kernels("all"):
        convolution(dtype).squares()
    assert any({"direct", *ON_PATCHES, "gram, fused"} <= set(names) for names in ranked.values())
    assert set(rounded) == {dtype == torch.float32}


@runs
@pytest.mark.parametrize("wanted", ["checked", "all", "none"])
def test_kernels_that_no_gpu_has_run_are_measured_only_where_all_are_wanted(
    wanted: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backends.ops import conv_kernel
    from backends.ops import kernels as products

    class Watched:
        def __init__(self, module: ModuleType, name: str) -> None:
            self.kernel, self.name = getattr(module, name), name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.add(self.name)
            return self.kernel[grid]

    launched: set[str] = set()
    by_few = ((products, "_squares_by_few"), (conv_kernel, "_product_by_few"))
    for module, name in by_few:
        monkeypatch.setattr(module, name, Watched(module, name))
    ranked: dict[tuple[str, torch.device], list[str]] = {}
    monkeypatch.setattr("backends.ops.choice._RANKED", ranked)
    linear = Outer(*(torch.randn(N, 70, width).to(DEVICE) for width in (150, 140)))
    with kernels(wanted):
        for form in (linear, convolution(torch.float32)):
            form.squares()
    checked = [{"direct", "gram", "fused", *CHECKED}, {"direct", *ON_PATCHES}]
    expected = {
        "none": [{"direct", "gram"}],
        "checked": checked,
        "all": [checked[0] | UNCHECKED, checked[1] | {"gram, fused"}],
    }
    of_norms = {what: set(names) for (what, _), names in ranked.items() if what.startswith("norms of")}
    assert list(of_norms.values()) == expected[wanted]
    said = {(", unchecked kernels too" in what, ", without kernels" in what) for what in of_norms}
    assert said == {(wanted == "all", wanted == "none")}
    assert launched == ({name for _, name in by_few} if wanted == "all" else set())


@runs
@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_what_is_done_for_samples_in_doubt_has_to_be_right_before_any_is(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here none is in doubt: what later ones get would be seen by nobody."""
    from backends.ops import gram_kernel
    from backends.ops.conv_kernel import Product

    asked: list[bool] = []
    chosen: dict[str, str] = {}

    def wrong(product: Any) -> Any:
        def found(*arguments: Any) -> Tensor:
            asked.append(any(type(each) is float and each == 0 for each in arguments))  # nothing is exact enough
            return product(*arguments) * (1 + asked[-1])

        return found

    monkeypatch.setattr("backends.ops.choice._RANKED", {})
    monkeypatch.setattr("backends.ops.choice.CHOSEN", chosen)
    monkeypatch.setattr(gram_kernel, "squares_of_products", wrong(gram_kernel.squares_of_products))
    monkeypatch.setattr(Product, "squares", wrong(Product.squares))
    linear = Outer(*(torch.randn(N, 70, width).to(DEVICE) for width in (150, 140)))
    form = linear if kind == "linear" else convolution(torch.float32)
    with kernels("all"):
        form.squares()
    (said,) = (said for what, said in chosen.items() if what.startswith("norms of"))
    assert set(re.findall(r"\((.*?) is off by", said)) == (
        CHECKED | UNCHECKED if kind == "linear" else {"patches, gram, fused", "gram, fused"}
    )
    assert True in asked
    assert False in asked


@runs
@pytest.mark.parametrize("programs", [1, 3, 100])
def test_programs_share_the_tiles_of_a_sample_in_doubt(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.ops import conv_kernel
    from backends.ops import kernels as products

    for module in (products, conv_kernel):
        monkeypatch.setattr(module, "FEW", programs)
        monkeypatch.setattr(module, "LARGEST", 16)
    known = torch.zeros(N, 2, 1, dtype=torch.float64, device=DEVICE)  # a sum of 0 is not sure
    known[1, 0] = 5.0
    conv = convolution(torch.float32)
    left, right = (torch.randn(N, 5, width).to(DEVICE) for width in (40, 50))
    rows = left.double().mT @ right.double(), grouped(convolution(torch.float32, torch.float64))
    few, each = (products.squares_of_products(left, right, known, 1e-3, few) for few in (True, False))
    for mine, exact in zip((few, each, product_of(conv).squares(known, 1e-3)), (rows[0], *rows), strict=True):
        right = exact.flatten(1).square().sum(1)
        right[1] = 5.0
        assert (mine.double() / right - 1).abs().max() <= 1e-6


@runs
@pytest.mark.parametrize("value", [0.0, 1e-21, *([] if INTERPRETED else [1e-30, torch.inf, torch.nan])])
def test_what_float32_cannot_bear_is_in_doubt(value: float) -> None:
    """Inner products of small vectors are zeros, with no error to be seen, though others make up for their size."""
    left, right = (torch.randn(N, 20, width).to(DEVICE) for width in (8, 4))
    left[1] *= value
    right[1] *= min(1e18, 1e-3 / value) if 0 < value < 1 else 1
    exact = (left.double().mT @ right.double()).flatten(1).square().sum(1)
    for few in (False, True):
        found = Outer(left, right).squares_by_gram_fused(few=few).double()
        assert found.isfinite().tolist() == exact.isfinite().tolist()
        assert ((found - exact).abs() <= 1e-5 * exact)[exact.isfinite()].all()


def test_more_vectors_than_inner_products_can_be_counted_are_refused() -> None:
    from backends.ops.gram_kernel import squares_by_gram

    vectors = torch.empty(1, 2**16, 1, device="meta", dtype=torch.float32)
    with pytest.raises(ValueError, match="65536 vectors of a sample are too many for a kernel; at most 46340"):
        squares_by_gram(vectors, vectors, 1.0)
