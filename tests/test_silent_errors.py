"""What libraries, and copies of a model, have got wrong without a word: now right, or refused with the reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backends import available, backend_class, get_backend
from backends.base import QUANTITIES, Backend, Unavailable, Unsupported
from backends.batch import Batch, apply, tensors
from tests.asserts import assert_close
from tests.cases import DEVICE, Functional, linear, real

pytestmark = pytest.mark.usefixtures("own_random_state")

Loss = Callable[[Tensor, Tensor], Tensor]
BACKENDS = [name for name in available() if name != "naive"]


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.flatten(1).sum(1) - targets).square()


class Clamped(torch.autograd.Function):
    """The identity, whose gradient is clamped: half of a loss has not half of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.1, 0.1)


class Closed(nn.Module):
    """A model whose parts hold on to each other by closures."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(5, 4), nn.Linear(4, 3), nn.Parameter(torch.full((3,), 1.5))
        self.steps = [lambda x: self.b(torch.tanh(self.a(x)))]
        self.b.register_forward_hook(lambda module, inputs, output: output * self.scale)
        before = self.a.forward
        self.a.forward = lambda x: before(x) * 2  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.steps[0](x)


def ordered_by_length(s: nn.Module, x: Tensor, length: Tensor) -> Tensor:
    """Where the first samples are as long as can be, they stay where they are."""
    order = length.argsort(descending=True, stable=True)
    return torch.tanh(s.a(x[order]))[order.argsort()]


def by_experts(s: nn.Module, x: Tensor, which: Tensor) -> Tensor:
    found = x.new_zeros(len(x), 4)
    for k, expert in enumerate((s.a, s.b)):
        if not len(rows := (which == k).nonzero().flatten()):
            continue
        found = found.index_add(0, rows, torch.tanh(expert(x[rows])))
    return found


def last(n: int, first: int, value: int) -> Tensor:
    """Return numbers of which the last one is another."""
    numbers = torch.full((n,), first)
    numbers[-1] = value
    return numbers


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)).train()


def a_module_twice() -> nn.Module:
    twice = nn.Linear(5, 5)
    return nn.Sequential(nn.Linear(5, 5), twice, nn.Tanh(), twice)


class Temperature(nn.Module):
    """A module that returns a number."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(0.3))

    def forward(self) -> Tensor:
        return self.log.exp()


CASES: dict[str, tuple[Callable[[], nn.Module], Batch, torch.dtype]] = {
    "closures": (Closed, real(6, 5), torch.float64),
    "ordered by length": (
        lambda: Functional(ordered_by_length, a=linear(5, 4)),
        (real(32, 5), last(32, 9, 10)),
        torch.float64,
    ),
    "experts": (
        lambda: Functional(by_experts, a=linear(5, 4), b=linear(5, 4)),
        (real(32, 5), last(32, 0, 1)),
        torch.float64,
    ),
    "one sample in eight has an expert of its own": (
        lambda: Functional(by_experts, a=linear(5, 4), b=linear(5, 4)),
        (real(32, 5), (torch.arange(32) % 8 == 5).long()),
        torch.float64,
    ),
    "a gradient that is clamped": (
        lambda: Functional(lambda s, x: s.b(Clamped.apply(s.a(x))), a=linear(5, 4), b=linear(4, 3)),
        real(6, 5),
        torch.float64,
    ),
    "gradients that add up to nothing": (
        lambda: Functional(lambda s, x: x * s.w, w=nn.Parameter(torch.zeros(5))),
        real(1, 5).expand(4, 5).clone(),
        torch.float64,
    ),
    "spectral norm": (spectral, real(6, 5), torch.float64),
    "a module that returns a number": (
        lambda: Functional(lambda s, x: s.a(x) * s.t(), a=linear(5, 4), t=Temperature()),
        real(6, 5),
        torch.float64,
    ),
    "a module twice": (a_module_twice, real(6, 5), torch.float64),
}


@pytest.mark.filterwarnings("ignore")  # a library's warning is no failure of it
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_is_right_or_refuses(backend: str, name: str, quantity: str) -> None:
    try:
        backend_class(backend).load()
    except Unavailable as absence:
        pytest.skip(str(absence))
    modes = {"opacus": ("hooks", "functorch", "ew")}.get(backend)
    right_or_refuse([get_backend(backend, mode=m) for m in modes] if modes else [get_backend(backend)], name, quantity)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_backpack_is_right_or_refuses_some_samples_at_a_time_too(name: str) -> None:
    right_or_refuse([get_backend("backpack", subsampling=2)], name, "grads")


def right_or_refuse(backends: list[Backend], name: str, quantity: str) -> None:
    build, inputs, dtype = CASES[name]
    model = build().to(DEVICE, dtype)
    inputs = apply(lambda t: t.to(DEVICE, dtype if t.is_floating_point() else t.dtype), inputs)
    n = len(tensors(inputs)[0])
    targets = (torch.arange(n) % 2 * 2.0 - 1).to(DEVICE, dtype)
    truth = getattr(get_backend("naive"), quantity)(model, squares)(inputs, targets)
    for backend in backends:
        try:
            fn = getattr(backend, quantity)(model, squares)
            for _ in range(2):
                assert_close(fn(inputs, targets), truth)
        except Unsupported:
            continue
    assert all(p.grad is None for p in model.parameters())


def test_rows_that_are_no_samples_are_found_before_some_are_asked_for() -> None:
    """On CUDA, an index beyond them would end the process."""
    try:
        backend_class("backpack").load()
    except Unavailable as absence:
        pytest.skip(str(absence))
    build, inputs, dtype = CASES["one sample in eight has an expert of its own"]
    fn = get_backend("backpack").variance(build().to(DEVICE, dtype), squares)
    with pytest.raises(Unsupported, match=r"`a` \(Linear\): 28 row\(s\) go in for 32 samples"):
        fn(apply(lambda t: t.to(DEVICE), inputs), torch.ones(32, device=DEVICE, dtype=dtype))


@pytest.mark.parametrize("backend", ["opacus", "expanded_weights", "backpack"])
def test_a_gradient_that_is_rounding_is_no_reason_to_refuse(backend: str) -> None:
    try:
        backend_class(backend).load()
    except Unavailable as absence:
        pytest.skip(str(absence))
    pooled = [nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    for rest in (pooled, []):  # of one parameter, or of all
        if backend == "expanded_weights" and not rest:
            continue  # it asks for a view that there is not, and says so
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), *rest)
        for dtype in (torch.float32, torch.float64):
            fn = get_backend(backend).grads(model.to(DEVICE, dtype), squares)
            assert fn(real(4, 3, 8, 8).to(DEVICE, dtype), torch.ones(4, device=DEVICE, dtype=dtype))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_may_have_gradients_of_their_own(backend: str) -> None:
    try:
        backend_class(backend).load()
    except Unavailable as absence:
        pytest.skip(str(absence))
    encoder, model = linear(5, 5).to(DEVICE, torch.float64), linear(5, 3).to(DEVICE, torch.float64)
    inputs, targets = encoder(real(6, 5).to(DEVICE)), real(6).to(DEVICE)
    for quantity in get_backend(backend).quantities:
        if backend == "opacus_ghost" and quantity == "grads":
            continue
        found = getattr(get_backend(backend), quantity)(model, squares)(inputs, targets)
        assert_close(found, getattr(get_backend("naive"), quantity)(model, squares)(inputs, targets))
    assert all(p.grad is None for p in encoder.parameters())


def test_a_norm_to_clip_to_is_above_zero() -> None:
    model = linear(5, 3).to(DEVICE, torch.float64)
    for backend in ("naive", "bookkeeping", "vmap"):
        with pytest.raises(ValueError, match=r"max_norm should be a number above 0, found -1.0"):
            get_backend(backend).clipped_sum(model, squares, max_norm=-1.0)
