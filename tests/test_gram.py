"""Norms in the Gram form, and inner products of patches that are never made."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.ops import persample
from backends.ops.conv_ways import grouped
from backends.ops.correlation import Correlation
from backends.ops.gram import Window, pairs, products_of_patches, sums
from backends.ops.persample import WIDER, PerSample
from tests.asserts import assert_close
from tests.cases import DEVICE, N, real
from tests.precisions import convolution

pytestmark = pytest.mark.usefixtures("own_random_state")


@st.composite
def windows(draw: st.DrawFn) -> Window:
    """Return how a convolution may read its input in one dimension: kernels that reach beyond it too."""
    width, stride, dilation = (draw(st.integers(1, most)) for most in (4, 3, 3))
    reach = dilation * (width - 1) + 1
    padding = draw(st.integers(0, reach))
    pixels = draw(st.integers(max(1, reach - 2 * padding), 8 + reach))
    return Window(width, stride, padding, dilation, pixels, (pixels + 2 * padding - reach) // stride + 1)


def reading(images: int, of: list[Window], samples: int = 2) -> Correlation:
    """Return a convolution that reads its input so."""
    channels, outputs = 2, 3
    x = real(samples, images, channels, *(w.pixels for w in of))
    y = real(samples, images, outputs, *(w.outputs for w in of))
    options = [tuple(getattr(w, name) for w in of) for name in ("stride", "padding", "dilation")]
    return Correlation(x, y, (outputs, channels, *(w.width for w in of)), *options, groups=1)


@settings(deadline=None, derandomize=True)  # a first run imports and is slow
@given(st.integers(1, 2), st.lists(windows(), min_size=1, max_size=2))
def test_products_of_patches_are_those_of_the_patches(images: int, of: list[Window]) -> None:
    form = reading(images, of)
    patches = form.patches().right
    assert_close(products_of_patches(form.x, form.windows()), patches @ patches.mT)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 2), st.lists(windows(), min_size=1, max_size=2), st.sampled_from([1, 2**21]))
def test_inner_products_of_samples_are_those_of_their_gradients(images: int, of: list[Window], at_a_time: int) -> None:
    form = reading(images, of, samples=4)
    exact = PerSample.gram(form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(persample.AT_A_TIME, DEVICE.type, at_a_time)
        patch.setitem(WIDER, torch.float64, torch.float64)
        patch.setattr("backends.ops.correlation.exact", lambda squares, *_: squares == squares)
        assert_close(form.gram_by_pixels(), exact)


def test_three_dimensions_are_as_one() -> None:
    form = reading(1, [Window(2, 1, 1, 1, 3, 3), Window(3, 2, 0, 1, 5, 2), Window(2, 1, 0, 2, 4, 2)])
    patches = form.patches().right
    assert_close(products_of_patches(form.x, form.windows()), patches @ patches.mT)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (Window(3, 1, 1, 1, 8, 8), 8**2),
        (Window(1, 2, 0, 1, 8, 4), 4**2),  # the others are not read
        (Window(3, 2, 1, 1, 8, 4), 4**2 + 4**2),
        (Window(3, 2, 0, 2, 9, 3), 5**2),
    ],
)
def test_pixels_are_multiplied_with_those_that_share_a_place(window: Window, expected: int) -> None:
    assert pairs(1, (window,)) == expected
    assert pairs(3, (window, Window(1, 1, 0, 1, 5, 5))) == 9 * expected * 25


def test_sums_say_where_their_rounding_may_show() -> None:
    """The bound that the error is under, of 40 vectors, is 1611 roundings of what a mean of 320 makes 4 million."""
    left, right = real(4, 40, 5), real(4, 40, 6)
    left -= left.mean(1, keepdim=True)
    right += torch.tensor([320.0, 10.0, 0.0, 0.0], device=DEVICE)[:, None, None]
    exact = (left.mT @ right).square().sum((1, 2))
    lefts, rights = left @ left.mT, right @ right.mT
    rights[3, 0, 0] = torch.inf
    squares, doubtful = sums(lefts, rights, 11, torch.float32)
    assert doubtful.tolist() == [True, False, False, True]
    assert_close(squares[1:3], exact[1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_the_gram_form_cancels_gradients_are_made(dtype: torch.dtype) -> None:
    form, exact = convolution(dtype), convolution(dtype, torch.float64)
    found, right = form.squares_by_gram(), grouped(exact).flatten(1).square().sum(1)
    assert found.dtype == torch.float32
    assert ((found.double() - right).abs() <= 8 * torch.finfo(dtype).eps * right).all()
    by_gram = sums(*form.inner_products(WIDER[dtype]), 0, dtype)[0].float()
    assert (found == by_gram).tolist() == [False, *[dtype == torch.float32] * 2]  # of 56 vectors, in float32: in doubt
    doubt = found != by_gram  # together, since of one sample alone another way may be the fastest
    assert torch.equal(found[doubt], PerSample.squares(replace(form, x=form.x[doubt], y=form.y[doubt])))


def test_where_one_sample_cancels_inner_products_are_those_of_gradients() -> None:
    form = convolution(torch.float32)
    direct, sure = PerSample.gram(form), form.only(slice(1, None))
    assert torch.equal(form.gram_by_pixels(), direct)
    exact = PerSample.gram(convolution(torch.float32, torch.float64).only(slice(1, None)))
    found = sure.gram_by_pixels()
    assert found.dtype == torch.float32
    assert not torch.equal(found, direct[1:, 1:])
    assert (found.double() - exact).abs().max() <= 2 * torch.finfo(torch.float32).eps * exact.max()


def test_samples_may_come_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    form = reading(1, [Window(3, 1, 1, 1, 6, 6), Window(3, 2, 1, 1, 7, 4)])
    form = Correlation(form.x.float(), form.y.float(), *list(vars(form).values())[2:7])
    together = form.squares_by_gram()
    monkeypatch.setitem(persample.AT_A_TIME, DEVICE.type, 1)
    assert len(form.parts_by_gram(torch.float64)) == 2
    torch.testing.assert_close(form.squares_by_gram(), together, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("size", "channels", "outputs", "groups", "less"),
    [(4, 16, 32, 1, True), (16, 16, 32, 1, False), (8, 32, 2, 1, False), (4, 16, 32, 2, False)],
)
def test_the_gram_form_is_measured_where_it_multiplies_less(
    size: int, channels: int, outputs: int, groups: int, less: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked: dict[tuple[str, torch.device], list[str]] = {}
    monkeypatch.setattr("backends.ops.choice._RANKED", ranked)
    x, y = (real(N, 1, each, size, size).float() for each in (channels, outputs))
    form = Correlation(x, y, (outputs, channels // groups, 3, 3), (1, 1), (1, 1), (1, 1), groups)
    exact = grouped(form).double().flatten(1).square().sum(1)
    torch.testing.assert_close(form.squares().double(), exact, rtol=1e-5, atol=0)
    assert any("gram" in names for names in ranked.values()) == less
    torch.testing.assert_close(form.gram().diagonal().double(), exact, rtol=1e-5, atol=0)
    assert any("by pixels" in names for names in ranked.values()) == less


def test_of_many_samples_inner_products_of_gradients_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are made once a sample, products of pixels once a pair."""
    ranked: dict[tuple[str, torch.device], list[str]] = {}
    monkeypatch.setattr("backends.ops.choice._RANKED", ranked)
    for samples, measured in ((8, True), (40, False)):  # 16² · 48 a pair, for 16 · 4608 a sample and 4608 a pair
        x, y = (real(samples, 1, channels, 4, 4).float() for channels in (16, 32))
        Correlation(x, y, (32, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1).gram()
        assert any("by pixels" in names for names in ranked.values()) == measured
        ranked.clear()
