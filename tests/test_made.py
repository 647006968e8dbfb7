"""Tensors that are made of parameters alone: what is made of them is right, and as cheap as an ordinary step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from backends import get_backend
from backends.base import QUANTITIES
from tests.asserts import assert_close
from tests.cases import DEVICE, Functional, linear, real, squares
from tests.habits import over_the_batch

pytestmark = pytest.mark.usefixtures("own_random_state")


def standardised(s: Any, x: Tensor) -> Tensor:
    w = s.c.weight
    mean, variance = w.mean((1, 2, 3), keepdim=True), w.var((1, 2, 3), keepdim=True, unbiased=False)
    return F.conv2d(x, (w - mean) / (variance + 1e-5).sqrt(), s.c.bias)


def part_and_whole(s: Any, x: Tensor) -> Tensor:
    """A parameter that is used as it is, too: its gradient is the sum."""
    h = F.linear(x, s.a.weight[:3], s.a.bias[:3])
    return F.linear(F.linear(h.sin(), s.a.weight[:, :3]), s.a.weight, s.a.bias)


def made_of_two(s: Any, x: Tensor) -> Tensor:
    return F.linear(x, s.a.weight @ s.b.weight, s.a.bias + s.b.bias)


def twice(s: Any, x: Tensor) -> Tensor:
    w = s.a.weight.tanh()
    return F.linear(F.linear(x, w).sin(), w)


def chunks(s: Any, x: Tensor) -> Tensor:
    first, second = s.a.weight.split([2, 3])
    return torch.cat([F.linear(x, first), F.linear(x.cos(), second)], -1)


def norm_by_hand(s: Any, x: Tensor) -> Tensor:
    normalised = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return normalised * (1.0 + s.b.weight)  # type: ignore[no-any-return]


def positions(s: Any, x: Tensor) -> Tensor:
    return s.a(x.sin() + s.b.weight[: x.shape[1]])  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a standardised convolution": (lambda: Functional(standardised, c=nn.Conv2d(2, 4, 3)), (2, 6, 6)),
    "a part, and the whole": (lambda: Functional(part_and_whole, a=linear(5, 5)), (2, 5)),
    "made of two": (lambda: Functional(made_of_two, a=linear(5, 5), b=linear(5, 5)), (2, 5)),
    "used twice": (lambda: Functional(twice, a=nn.Linear(5, 5, bias=False)), (2, 5)),
    "chunks": (lambda: Functional(chunks, a=nn.Linear(5, 5, bias=False)), (2, 5)),
    "1 + w": (lambda: Functional(norm_by_hand, b=nn.RMSNorm(5)), (2, 5)),
    "positions": (lambda: Functional(positions, a=linear(5, 5), b=nn.Embedding(9, 5)), (2, 5)),
    "weight_norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(2, 4, 3)), nn.Tanh()), (2, 6, 6)),
    "attention to something else": (
        lambda: Functional(lambda s, x: s.m(x, x.cos(), x.sin())[0], m=nn.MultiheadAttention(5, 1, batch_first=True)),
        (2, 5),
    ),
}


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_made_of_parameters_has_rules(name: str, quantity: str) -> None:
    make, shape = MODELS[name]
    model = make().to(DEVICE, torch.float64)
    ours, loop = (getattr(get_backend(b), quantity)(model, squares) for b in ("bookkeeping", "naive"))
    for n in (5, 8):  # the second call knows the layout
        inputs, targets = real(n, *shape).to(DEVICE), real(n).to(DEVICE)
        assert_close(ours(inputs, targets), loop(inputs, targets))
    assert over_the_batch(model, inputs, targets)


def test_what_is_used_otherwise_too_is_not_left_out() -> None:
    """The gradient by an op without a rule would not be there."""
    model = Functional(lambda s, x: s.a(x) + x.atan2(2 * s.a.bias), a=linear(5, 5)).to(DEVICE, torch.float64)
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    inputs, targets = real(6, 5).to(DEVICE), real(6).to(DEVICE)
    assert_close(ours(inputs, targets), loop(inputs, targets))
    assert not over_the_batch(model, inputs, targets)


def test_what_is_made_anew_follows_an_optimizers_step() -> None:
    model = Functional(twice, a=nn.Linear(5, 5, bias=False)).to(DEVICE, torch.float64)
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    inputs, targets = real(6, 2, 5).to(DEVICE), real(6).to(DEVICE)
    for _ in range(3):
        assert_close(ours(inputs, targets), loop(inputs, targets))
        with torch.no_grad():
            model.a.weight.mul_(0.9)


def test_what_is_made_and_then_changed_is_right() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        w = s.a.weight.clone()
        first = F.linear(x, w)
        return F.linear(first.sin(), w.mul_(2))

    model = Functional(forward, a=nn.Linear(5, 5, bias=False)).to(DEVICE, torch.float64)
    inputs, targets = real(6, 2, 5).to(DEVICE), real(6).to(DEVICE)
    found = []
    for name in ("bookkeeping", "naive"):
        try:
            found.append(get_backend(name).grads(model, squares)(inputs, targets))
        except RuntimeError:  # as autograd, which needs what has been changed
            found.append({})
    assert_close(*found)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_a_hook_makes_is_made_of_parameters() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(5, 5)), nn.Tanh()).to(DEVICE, torch.float64)
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    inputs, targets = real(6, 2, 5).to(DEVICE), real(6).to(DEVICE)
    assert_close(ours(inputs, targets), loop(inputs, targets))


def test_under_autocast_what_is_made_is_right() -> None:
    model = Functional(twice, a=nn.Linear(32, 32, bias=False)).to(DEVICE, torch.float32)
    inputs, targets = real(6, 2, 32).float().to(DEVICE), real(6).float().to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours, loop = (get_backend(b).grads(model, squares)(inputs, targets) for b in ("bookkeeping", "naive"))
    assert ours["a.weight"].dtype == torch.float32
    assert (ours["a.weight"] - loop["a.weight"]).norm() < 0.05 * loop["a.weight"].norm()
