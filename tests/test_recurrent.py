"""Recurrent layers: torch's kernels show no pairs, so that their gradients are had in ways of their own."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backends import get_backend
from backends.base import QUANTITIES
from backends.ops import scan
from backends.ops.passes import Passes
from tests.asserts import assert_close
from tests.cases import DEVICE, Functional, N, real, squares
from tests.habits import differentiated_directly, over_the_batch

pytestmark = pytest.mark.usefixtures("own_random_state")

T = 37  # more positions than have their slopes at a time
WAYS = "by torch's kernel", "position by position"

LAYERS: dict[str, Any] = {
    "RNN": nn.RNN,
    "RNN, ReLU": partial(nn.RNN, nonlinearity="relu"),
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
}


def everything(s: Any, x: Tensor) -> Tensor:
    """Return what depends on all that a layer returns, from a first state that is learned."""
    first = s.h.expand(-1, len(x), -1).contiguous()
    outputs, last = s.r(x.transpose(0, 1), (first, first.sin()) if isinstance(s.r, nn.LSTM) else first)
    ends = last if isinstance(last, tuple) else (last,)
    return outputs.transpose(0, 1).flatten(1) + sum((k + 1) * end.sum((0, 2)) for k, end in enumerate(ends))[:, None]


def model_of(layer: str, **options: Any) -> nn.Module:
    recurrent = LAYERS[layer](5, 4, **options)
    runs = recurrent.num_layers * (1 + recurrent.bidirectional)
    return Functional(everything, r=recurrent, h=nn.Parameter(real(runs, 1, 4))).to(DEVICE, torch.float64)


def take_the_way(monkeypatch: pytest.MonkeyPatch, way: str) -> list[str]:
    """Have gradients made in one of the ways; return where it is noted each time."""
    taken: list[str] = []

    def chosen(ways: dict[str, Any], *of: Any) -> str:
        assert tuple(ways) == WAYS
        taken.append(way)
        return way

    monkeypatch.setattr(scan, "fastest_name", chosen)
    return taken


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}], ids=["plain", "two"])
@pytest.mark.parametrize("layer", LAYERS)
def test_both_ways_agree_with_the_loop(
    layer: str, options: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = take_the_way(monkeypatch, way)
    model = model_of(layer, **options)
    assert over_the_batch(model, real(N, T, 5), real(N))
    for quantity in QUANTITIES:
        ours, loop = (getattr(get_backend(name), quantity)(model, squares) for name in ("bookkeeping", "naive"))
        assert_close(ours(real(N, T, 5), real(N)), loop(real(N, T, 5), real(N)))
    assert taken


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", ["LSTM", "GRU"])
def test_a_gate_that_is_open_for_good_is_right(layer: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes into it is infinite for one sample, later on: its slope is 0, and other gates' are not."""
    take_the_way(monkeypatch, way)
    model = model_of(layer)
    with torch.no_grad():
        model.r.weight_ih_l0[:4, 0] = 1e200
    ours, loop = (get_backend(name).norms(model, squares) for name in ("bookkeeping", "naive"))
    inputs = real(N, T, 5)
    inputs[..., 0] = 0
    assert_close(ours(inputs, real(N)), loop(inputs, real(N)))
    inputs[0, :, 0] = 1e200
    assert loop(inputs, real(N)).isfinite().all()
    assert_close(ours(inputs, real(N)), loop(inputs, real(N)))


@pytest.mark.parametrize("layer", LAYERS)
def test_they_have_rules_under_vmap(layer: str) -> None:
    model = Functional(lambda s, x: s.r(x)[0], r=LAYERS[layer](5, 4, 2, bidirectional=True))
    assert not differentiated_directly(model.to(DEVICE, torch.float64), real(N, 3, 5), real(N))


def test_layers_are_not_asked_to_put_copies_of_weights_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Functional(lambda s, x: s.r(x)[0], r=nn.LSTM(5, 4)).to(DEVICE, torch.float64)
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda self: self.weight_ih_l0.data_ptr())  # as on CUDA
    passes = Passes(model, squares)
    passes.under_vmap(True).run(real(N, 3, 5), real(N), lambda name, g: g)
    assert "flatten_parameters" not in vars(model.r)
