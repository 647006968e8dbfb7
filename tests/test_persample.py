"""Every form that per-sample gradients are held in, against its own rows."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from backends import get_backend
from backends.derived import Moments
from backends.ops import persample
from backends.ops.choice import CHOSEN
from backends.ops.conv_ways import by_patches, by_places, grouped
from backends.ops.correlation import Correlation
from backends.ops.einsum import _Reshaped
from backends.ops.float16 import without_float16
from backends.ops.linear import Scattered
from backends.ops.made import Through
from backends.ops.outer import Outer
from backends.ops.persample import Dense, PerSample, scaled
from backends.ops.several import Grouped, Together, added
from tests.asserts import assert_close
from tests.cases import DEVICE, N, real

pytestmark = pytest.mark.usefixtures("own_random_state")


def forms() -> dict[str, PerSample]:
    """Return one of each form; the table has a row that a sample takes twice, and one that none takes."""
    conv = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    return {
        "dense": Dense(real(N, 4, 5)),
        "dense, a scalar parameter": Dense(real(N)),
        "outer, no vector": Outer(real(N, 0, 4), real(N, 0, 5)),
        "outer, one vector": Outer(real(N, 1, 4), real(N, 1, 5)),
        "outer, few vectors": Outer(real(N, 2, 40), real(N, 2, 50)),
        "outer, many vectors": Outer(real(N, 30, 4), real(N, 30, 5)),
        "outer, samples on the second axis": Outer(real(7, N, 4).transpose(0, 1), real(7, N, 5).transpose(0, 1)),
        "table": Scattered(torch.tensor([[0, 1, 1], [2, 0, 3], [3, 3, 3]], device=DEVICE), real(N, 3, 5), 6),
        "convolution": Correlation(real(N, 2, 4, 9, 8), real(N, 2, 6, 5, 4), (6, 4, 3, 3), **conv, groups=1),
        "convolution, small images": Correlation(
            real(N, 1, 4, 9, 8), real(N, 1, 99, 5, 4), (99, 4, 3, 3), **conv, groups=1
        ),
        "convolution, groups": Correlation(real(N, 1, 4, 9, 8), real(N, 1, 6, 5, 4), (6, 2, 3, 3), **conv, groups=2),
        "sum": added([Dense(real(N, 4, 5)), Outer(real(N, 2, 4), real(N, 2, 5))], N, real(4, 5)),
        "sum with a table": added(
            [
                Outer(real(N, 2, 6), real(N, 2, 5)),
                Scattered(torch.tensor([[0, 1, 1], [2, 0, 3], [3, 3, 3]], device=DEVICE), real(N, 3, 5), 6),
            ],
            N,
            real(6, 5),
        ),
        "sum of products": added([Outer(real(N, t, 4), real(N, t, 5)) for t in (2, 3)], N, real(4, 5)),
        "sum of nothing": added([], N, real(4, 5)),
        "two groups": Grouped([Outer(real(2, 3, 4), real(2, 3, 5)), Dense(real(1, 4, 5))], [True, False, True]),
        "a matrix in another shape": _Reshaped(Outer(real(N, 2, 4), real(N, 2, 15)), (4, 3, 5)),
    }


@pytest.mark.parametrize("at_a_time", [2**22, 1], ids=["all at once", "one at a time"])
@pytest.mark.parametrize("name", forms())
def test_every_form_agrees_with_its_own_rows(name: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(persample.AT_A_TIME, DEVICE.type, at_a_time)
    form, factors = forms()[name], real(N)
    rows = form.rows(slice(None))
    flat = rows.reshape(N, -1)
    assert rows.shape == (N, *form.shape)
    assert_close(form.grads(lambda shape, like: like.new_empty(shape)), rows)
    assert_close(form.rows(slice(1, 2)), rows[1:2])
    total = real(2, *form.shape)
    expected = total + rows[1:3]
    form.add_to(total, slice(1, 3))
    assert_close(total, expected)
    assert_close(form.compact().rows(slice(None)), rows)
    assert_close(form.squares(), flat.square().sum(1))
    assert_close(form.weighted(factors), (factors @ flat).view(form.shape))
    assert_close(form.variance(), rows.var(0, correction=0))
    assert_close(form.gram(), flat @ flat.T)


@pytest.mark.parametrize("lengths", [(5,), (1,), (1, 1, 3), (3, 1, 1), (1, 3, 1), (2, 2, 2)], ids=str)
def test_variance_does_not_depend_on_how_samples_come(lengths: tuple[int, ...]) -> None:
    grads = 1e6 + real(sum(lengths), 4, 5)  # far from zero: a difference of moments would lose twelve digits
    moments, given = Moments(), grads.clone()
    for part in given.split(lengths):
        moments.add(part)
        part.fill_(torch.nan)  # a backend may write the next ones to the same memory
    torch.testing.assert_close(moments.variance(), grads.var(0, correction=0), rtol=1e-8, atol=0)


def test_small_parameters_together_agree_with_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, PerSample] = {"scalar": Dense(real(N)), "bias": Dense(real(N, 5)), "weight": Dense(real(N, 4, 5))}
    large, factors = Outer(real(N, 2, 40), real(N, 2, 50)), real(N)
    assert all(g.is_small() for g in small.values())
    assert large.is_small(), "with few samples"
    monkeypatch.setattr("backends.ops.persample.LITTLE", 8 * N * 2000 - 1)
    assert not large.is_small()
    assert not Dense(real(N, 4097)).is_small()
    small["products"] = Outer(real(N, 2, 4), real(N, 2, 5))
    everything: dict[str, PerSample] = {**small, "large": large}
    rows = torch.cat([g.rows(slice(None)).reshape(N, -1) for g in everything.values()], 1)
    assert_close(Together({**small, "large": large.squares()}).squares(), rows.square().sum(1))
    assert_close(Together({**small, "large": large.gram()}).gram(), rows @ rows.T)
    variances, sums = Together({**small, "large": large.variance()}).variances(), Together(small).weighted(factors)
    for name, g in everything.items():
        assert_close(variances[name], g.variance())
        assert name == "large" or sums[name].untyped_storage().nbytes() == sums[name].nbytes, "memory of its own"
    for name, g in small.items():
        assert_close(sums[name], g.weighted(factors))
    assert_close(Together({"large": large.squares()}).squares(), large.squares())
    assert Together({}).weighted(factors) == {}


@pytest.mark.filterwarnings("error:Casting complex values")
def test_parameters_of_several_dtypes_are_not_cast_to_each_other() -> None:
    dtypes = torch.complex128, torch.float64, torch.float32, torch.float64
    small = {f"{i} {dtype}": Dense(real(N, 5).to(dtype)) for i, dtype in enumerate(dtypes)}
    together = Together(small)
    for found in (together.weighted(real(N)), together.variances()):
        assert found.keys() == small.keys()
        assert all(found[name].dtype == g.like.dtype for name, g in small.items())


def test_both_ways_to_the_norms_of_a_table_agree() -> None:
    table = forms()["table"]
    assert isinstance(table, Scattered)
    table.squares()
    assert CHOSEN[f"norms of 3 rows of a table 6×5, float64, {DEVICE.type}, 2 samples or more"] in ("sorted", "direct")
    assert_close(table.squares_by_sorting(), table.rows(slice(None)).square().sum((1, 2)))


@pytest.mark.parametrize("name", [name for name in forms() if "convolution" in name and "groups" not in name])
def test_both_ways_of_a_convolution_agree(name: str) -> None:
    form = forms()[name]
    assert isinstance(form, Correlation)
    assert_close(by_patches(form), grouped(form))
    form.rows(slice(None))
    chosen = get_backend("bookkeeping", chunk_size=2).choices()
    assert chosen[f"{form.geometry()}, float64, {DEVICE.type}, 2 samples or more"] in ("by_patches", "grouped")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (((1, 1), (0, 0), (1, 1)), ""),
        (((2, 2), (1, 1), (1, 1)), ", stride 2×2, padding 1×1"),
        (((1, 1), (0, 0), (1, 2)), ", dilation 1×2"),
    ],
)
def test_a_geometry_names_what_is_unusual(options: tuple[tuple[int, int], ...], named: str) -> None:
    form = Correlation(real(N, 1, 4, 9, 8), real(N, 1, 6, 5, 4), (6, 4, 3, 3), *options, groups=1)
    assert form.geometry() == f"weight 6×4×3×3, input 1×4×9×8{named}"


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (1, 3, 2)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_product_for_each_place_of_the_kernel_agrees(kernel: tuple[int, ...], dilation: int) -> None:
    sizes, padding = (7, 6, 8)[: len(kernel)], (1, 0, 2)[: len(kernel)]
    options = {"stride": (1,) * len(kernel), "padding": padding, "dilation": (dilation,) * len(kernel), "groups": 1}
    out = [s + 2 * p - dilation * (k - 1) for s, p, k in zip(sizes, padding, kernel, strict=True)]
    form = Correlation(real(N, 1, 4, *sizes), real(N, 1, 5, *out), (5, 4, *kernel), **options)
    assert_close(by_places(form), grouped(form))
    form.rows(slice(None))
    chosen = CHOSEN[f"{form.geometry()}, float64, {DEVICE.type}, 2 samples or more"]
    assert chosen in ("by_patches", "by_places", "grouped")


@pytest.mark.parametrize(("left", "right"), [(0.0, 1e20), (1e-15, 1e20), (1e-24, 1e10)])
def test_a_vector_may_be_far_larger_than_its_product_with_another(left: float, right: float) -> None:
    """As where a sample whose inputs are a sentinel is masked in its loss."""
    pair = Outer(real(N, 1, 40).float() * left, real(N, 1, 50).float() * right)
    exact = Outer(pair.left.double(), pair.right.double()).gram()
    assert (pair.gram().double() - exact).abs().max() <= 1e-6 * exact.max()
    assert (pair.squares().double() - exact.diag()).abs().max() <= 1e-6 * exact.max()


@pytest.mark.parametrize("name", forms())
def test_every_form_is_the_same_without_float16(name: str) -> None:
    form = forms()[name]
    assert without_float16(form) is form
    coarse = _in(form, torch.float16)
    wider = without_float16(coarse)
    assert (wider.like.dtype, wider.rows(slice(None)).dtype) == (torch.float32, torch.float32)
    inner = [part for value in vars(wider).values() for part in (value if isinstance(value, list) else [value])]
    assert all(part.like.dtype == torch.float32 for part in inner if isinstance(part, PerSample))
    exact = form.rows(slice(None))
    assert (wider.rows(slice(None)).double() - exact).norm() <= 1e-2 * exact.norm()


def _in(form: PerSample, dtype: torch.dtype) -> PerSample:
    def cast(value: Any) -> Any:
        if isinstance(value, PerSample):
            return _in(value, dtype)
        if isinstance(value, list):
            return [cast(part) for part in value]
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return replace(form, **{f.name: cast(getattr(form, f.name)) for f in fields(form)})  # type: ignore


def test_what_is_added_to_gradients_by_a_view_stays_out_of_them() -> None:
    w = real(4, 5).requires_grad_()
    by_a_view = Through(Dense(real(N, 20)), w.view(20), w)
    both = added([by_a_view, Dense(real(N, 4, 5))], N, w)
    assert_close(both.rows(slice(None)), both.rows(slice(None)))
    assert_close(by_a_view.rows(slice(None)), real(N, 20).view(N, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 30.0], ids=["plain", "cancels"])
def test_squares_of_products_are_as_precise_as_their_dtype(dtype: torch.dtype, mean: float) -> None:
    """Inputs that are nearly constant, and gradients of sum zero: the Gram form alone would lose all digits."""
    left = real(N, 16, 300)
    pair = Outer((left - left.mean(1, keepdim=True)).to(dtype), (real(N, 16, 310) + mean).to(dtype))
    exact = Outer(pair.left.double(), pair.right.double()).squares()
    gap = (pair.squares().double() - exact).abs() / exact
    assert pair.squares_by_gram().min() > 0
    assert gap.max() < 8 * torch.finfo(dtype).eps


def test_float16_is_scaled_by_what_it_cannot_hold() -> None:
    t, factors = 30000 * real(N, 2, 4).sign().half(), torch.tensor([1e-7, 1e-6, 1.0], device=DEVICE)
    exact = t.double() * factors.double()[:, None, None]
    assert ((scaled(t, factors).double() - exact).abs() <= 2**-10 * exact.abs()).all()
