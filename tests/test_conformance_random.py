"""Convolutions with options drawn at random: whatever they are, a backend is right or refuses."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from backends import backend_class, get_backend, reference, variants
from backends.base import QUANTITIES, Unavailable, Unsupported
from testbed.conformance.case import Layout, Setup, squared_error
from testbed.conformance.uses import call
from tests.asserts import CLOSE

FEW = settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[str, dict[str, Any], Layout, list[str]]:
    """Draw a layer's name and options, a way to call it, and which of its parameters are frozen."""
    d = draw(st.integers(1, 3))
    transposed = draw(st.booleans())

    def axes(low: int, high: int) -> Any:
        return draw(st.one_of(st.integers(low, high), st.tuples(*[st.integers(low, high)] * d)))

    options = {"in_channels": 6, "out_channels": draw(st.sampled_from([6, 12])), "bias": draw(st.booleans())}
    options |= {"groups": draw(st.sampled_from([1, 2, 3])), "kernel_size": axes(1, 3), "dilation": axes(1, 2)}
    if transposed:
        options |= {"padding": axes(0, 1), "stride": axes(1, 3)}
    else:
        padding = draw(st.sampled_from(["same", "valid", axes(0, 2)]))
        modes = ["zeros", "reflect", "replicate", "circular"]
        options |= {"padding": padding, "padding_mode": draw(st.sampled_from(modes))}
        options |= {"stride": 1 if padding == "same" else axes(1, 3)}
    shape = (6, *(draw(st.integers(5, 7)) for _ in range(d)))
    frozen = draw(st.sampled_from([[], ["layer.weight"], ["layer.bias"]]))
    name = f"Conv{'Transpose' if transposed else ''}{d}d"
    return name, options, Layout(call, shape, samples=draw(st.integers(1, 4))), frozen


def setup(name: str, options: dict[str, Any], layout: Layout, frozen: list[str]) -> Setup:
    """Return the problem in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        made = layout.setup(getattr(nn, name)(**options))
    for parameter, p in made.model.named_parameters():
        p.requires_grad_(parameter not in frozen)
    assert isinstance(made.inputs, torch.Tensor)
    return Setup(made.model.double(), squared_error, made.inputs.double(), made.targets.double())


@pytest.mark.filterwarnings("ignore")  # padding='same' copies, libraries remark on layers
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("variant", [v for v in variants() if v[0] != reference()], ids=str)
@FEW
@given(drawn=convolutions())
def test_a_convolution_is_right_or_refused(variant: tuple[str, dict[str, Any]], quantity: str, drawn: Any) -> None:
    name, options = variant
    try:
        backend_class(name).load()
    except Unavailable as absence:
        pytest.skip(str(absence))
    if quantity not in backend_class(name).quantities or not backend_class(name).native(quantity):
        pytest.skip("derived from grads, or not computed")
    s = setup(*drawn)
    truth = getattr(get_backend(reference()), quantity)(s.model, s.loss_fn)(s.inputs, s.targets)
    try:
        found = getattr(get_backend(name, **options), quantity)(s.model, s.loss_fn)(s.inputs, s.targets)
    except Unsupported:
        return
    torch.testing.assert_close(found, truth, **CLOSE)
