"""Samples that act on each other in ways that three or four of them need not show; each held against the loop."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends import get_backend
from backends.base import LossFn
from backends.ops.choice import CHOSEN
from backends.ops.near import near
from tests.cases import DEVICE, Functional, cross_entropy, linear, real, squares

pytestmark = pytest.mark.usefixtures("own_random_state")


@dataclass
class Coupled:
    """A loss, a model's forward, and batches (inputs, targets), in the dtype in which it may be overlooked."""

    loss: LossFn
    batches: list[tuple[Tensor, Tensor]]
    forward: Callable[..., Tensor] = lambda s, x: s.b(torch.tanh(s.a(x)))
    dtype: torch.dtype = torch.float64


CLASSES = torch.arange(32, device=DEVICE) % 5
WITH_WEIGHTS = [torch.stack([real(32), w.to(DEVICE)], 1) for w in (torch.ones(32), torch.zeros(32), real(32).abs())]


def by_the_largest_weight(outputs: Tensor, targets: Tensor) -> Tensor:
    return targets[:, 1] / targets[:, 1].max() * (outputs[:, 0] - targets[:, 0]).square()


def by_the_largest_reward(outputs: Tensor, targets: Tensor) -> Tensor:
    return targets[:, 1] / (targets[:, 1].abs().max() + 1e-8) * outputs[:, 0].sin()


def by_the_spread(outputs: Tensor, targets: Tensor) -> Tensor:
    return (targets - targets.mean()) / (targets.std() + 1e-8) * outputs.sin().sum(1)


def but_outliers(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = cross_entropy(outputs, targets)
    known = losses.detach()
    return torch.where(known <= known.mean() + 2 * known.std(unbiased=False), losses, 0 * losses)


def but_the_largest(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = cross_entropy(outputs, targets)
    rank = (losses[:, None] > losses).sum(1)
    return torch.where(rank < len(losses) - int(0.1 * len(losses)), losses, 0 * losses)


def apart(outputs: Tensor, targets: Tensor, margin: float = 0.3) -> Tensor:
    distance = torch.cdist(outputs, outputs) + 10 * torch.eye(len(outputs)).to(outputs)
    return cross_entropy(outputs, targets) + F.relu(margin - distance).sum(1)


def with_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    share = outputs.softmax(1).mean(0)
    return cross_entropy(outputs, targets) + 0.02 * (share * share.log()).sum()


def with_a_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return squares(outputs, targets) + 1e-4 * outputs.sum(0).square().sum()


def of_a_capacity(s: nn.Module, x: Tensor) -> Tensor:
    taken = s.a(x).softmax(-1).T.topk(min(max(4, len(x) // 4), len(x)), dim=1).indices
    return x + s.b(x) * torch.zeros_like(x.T).scatter(1, taken, 1.0).T


class Clipped(torch.autograd.Function):
    """The identity, whose gradient is clipped over the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (3 / g.norm()).clamp(max=1)


def by_statistics_from_eight_on(s: nn.Module, x: Tensor) -> Tensor:
    h = s.a(x)
    return s.b(torch.tanh((h - h.mean(0)) / h.std(0) if len(h) >= 8 else h))


def of_at_most(s: nn.Module, x: Tensor) -> Tensor:
    h = s.a(x)
    return s.b(torch.tanh(h * (50 / h.norm()).clamp(max=1)))


def below_the_largest(s: nn.Module, x: Tensor) -> Tensor:
    e = (h := s.a(x)).sub(h.max()).exp()
    return s.b(e / e.sum(1, keepdim=True))


def with_a_shared_code(s: nn.Module, x: Tensor) -> Tensor:
    code = s.b(torch.ones(1, 5, dtype=x.dtype, device=x.device))
    return s.a(x) * (1 + code) + 1e-4 * code.square().sum()


def pixels() -> Tensor:
    found = real(32, 5).sigmoid()
    found[:, 0] = 1
    found[[5, 9, 12]] *= 0.5
    return found


X = real(32, 5)
MANY, THEIRS = real(512, 5), real(512)
COUPLED = {
    "weights by the largest": Coupled(by_the_largest_weight, [(X, t) for t in WITH_WEIGHTS]),
    "rewards by the largest": Coupled(by_the_largest_reward, [(X, t) for t in WITH_WEIGHTS[1:]]),
    "advantages by their spread": Coupled(by_the_spread, [(X, real(32))]),
    "outliers dropped": Coupled(but_outliers, [(3 * X, CLASSES)]),
    "the largest dropped": Coupled(but_the_largest, [(X, CLASSES)]),
    "kept apart": Coupled(apart, [(3 * real(128, 5), torch.arange(128, device=DEVICE) % 5)]),
    "kept apart in a later batch": Coupled(
        partial(apart, margin=0.03), [(scale * real(8, 5), torch.arange(8, device=DEVICE) % 5) for scale in (6, 0.01)]
    ),
    "the mean's entropy": Coupled(with_entropy, [(X, CLASSES)], dtype=torch.float32),
    "a small penalty on a sum": Coupled(with_a_sum, [(MANY, THEIRS)], dtype=torch.float32),
    "a penalty on what all share": Coupled(squares, [(MANY, THEIRS)], with_a_shared_code, torch.float32),
    "a capacity": Coupled(squares, [(X, real(32))], of_a_capacity),
    "clipped backwards": Coupled(
        cross_entropy,
        [(real(128, 5), torch.arange(128, device=DEVICE) % 5)],
        lambda s, x: s.b(Clipped.apply(torch.tanh(s.a(x)))),
    ),
    "pixels by the brightest": Coupled(
        cross_entropy, [(pixels(), CLASSES)], lambda s, x: s.b(torch.tanh(s.a(x / x.max())))
    ),
    "a norm of all, bounded in a later batch": Coupled(cross_entropy, [(X, CLASSES), (9 * X, CLASSES)], of_at_most),
    "the largest of all, in a later batch": Coupled(
        cross_entropy, [(X, CLASSES), (torch.cat([X[:31], 1e5 * X[31:]]), CLASSES)], below_the_largest
    ),
    "statistics of eight": Coupled(cross_entropy, [(X, CLASSES)], by_statistics_from_eight_on),
}


def model_of(forward: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> nn.Module:
    return Functional(forward, **{"a": linear(5, 5), "b": linear(5, 5), **parts}).to(DEVICE, torch.float64)


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:std\\(\\)")
@pytest.mark.parametrize("quantity", ["grads", "norms", "clipped_sum"])
@pytest.mark.parametrize("name", COUPLED)
def test_each_sample_has_the_gradient_that_it_has_alone(name: str, quantity: str) -> None:
    case = COUPLED[name]
    model = model_of(case.forward).to(case.dtype)
    ours, loop = (getattr(get_backend(b), quantity)(model, case.loss) for b in ("bookkeeping", "naive"))
    for batch in case.batches:
        inputs, targets = (t.to(case.dtype) if t.is_floating_point() else t for t in batch)
        close = {"rtol": 1e-7, "atol": 1e-10} if case.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(ours(inputs, targets), loop(inputs, targets), equal_nan=True, **close)


def test_samples_that_are_apart_are_run_over_the_batch() -> None:
    """What is made up, and a batch larger than those before, must not give a false alarm."""
    model = model_of(lambda s, x: s.b(F.relu(s.a(x / x.norm(dim=1, keepdim=True)))))
    norms = get_backend("bookkeeping").norms(model, cross_entropy)
    for n in (32, 100):
        norms(real(n, 5), torch.arange(n, device=DEVICE) % 5)
        assert CHOSEN["passes of Functional"] == "over the batch"


def test_a_sample_that_is_not_finite_alone_must_not_be_so_in_a_batch() -> None:
    nan, one = ({"p": torch.full((2,), value)} for value in (float("nan"), 1.0))
    assert [near(*both) for both in ((one, nan), (nan, one), (nan, nan), (one, one))] == [False, False, True, True]


def test_a_larger_batch_is_looked_at_again() -> None:
    """Of 6 samples none is dropped, of 32 some are."""
    model, grads = model_of(lambda s, x: s.b(torch.tanh(s.a(x)))), []
    for name in ("bookkeeping", "naive"):
        fn = get_backend(name).grads(model, but_the_largest)
        grads.append([fn(X[:n], CLASSES[:n]) for n in (6, 32, 6)])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("rare", ["a token", "a gap", "no gap"])
def test_a_parameter_that_few_samples_use(rare: str) -> None:
    """It is there as [N, ...], and an index takes the first one's."""
    x, table = real(12, 5), real(50, 5)
    if rare == "a token":
        inputs: Tensor = torch.arange(36, device=DEVICE).view(12, 3)
        inputs[[4, 7], 1] = 50
        model = model_of(
            lambda s, x: s.a(F.embedding(x, torch.cat([table, s.new])).mean(1)), new=nn.Parameter(real(1, 5))
        )
    else:
        inputs = x.masked_fill(x > (1.5 if rare == "a gap" else 100), float("nan"))
        model = model_of(lambda s, x: s.a(torch.where(x.isnan(), s.new[0], x)), new=nn.Parameter(real(1, 5)))
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    for batch in (inputs, inputs.flip(0), x.masked_fill(x > 0, float("nan")) if x.shape == inputs.shape else inputs):
        torch.testing.assert_close(ours(batch, real(12)), loop(batch, real(12)))


def test_a_parameter_may_have_the_same_gradient_for_all() -> None:
    """There as [N, ...], with what each sample adds in a place of its own."""
    model = model_of(lambda s, x: torch.tanh(s.a(x)).sum(1, keepdim=True) - s.c, c=nn.Parameter(real(1, 1)))
    loss: LossFn = lambda o, t: (o[:, 0] - t - 100).abs()  # noqa: E731  its gradient is -1
    ours, loop = (get_backend(b).grads(model, loss) for b in ("bookkeeping", "naive"))
    torch.testing.assert_close(ours(X, real(32)), loop(X, real(32)))
    assert CHOSEN["passes of Functional"] == "over the batch"


def test_a_small_penalty_on_a_parameter_that_is_copied_is_seen() -> None:
    """Each sample's loss would ask for all copies; in float32 a gradient may be a hundredth apart."""
    model = model_of(
        lambda s, x: s.a(torch.where(x > 0, x, s.new)) + 1e-4 * s.new.square().sum(), new=nn.Parameter(real(1, 5))
    ).float()
    loss: LossFn = lambda o, t: o.sum(1) * t  # noqa: E731  linear: it shows no other's part
    ours, loop = (get_backend(b).grads(model, loss) for b in ("bookkeeping", "naive"))
    found = (fn(X.float(), real(32).float()) for fn in (ours, loop))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_parameter_may_be_used_by_some() -> None:
    """A null embedding in place of a condition that is dropped: one sample that is looked at has it."""

    def forward(s: nn.Module, x: Tensor, dropped: Tensor) -> Tensor:
        return torch.tanh(s.a(x) + torch.where(dropped[:, None], s.new, s.b(x)))

    model = model_of(forward, new=nn.Parameter(real(1, 5)))
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    dropped = torch.arange(32, device=DEVICE) % 10 == 0
    dropped[[0, 20]] = False
    torch.testing.assert_close(ours((X, dropped), real(32)), loop((X, dropped), real(32)))
    assert CHOSEN["passes of Functional"] == "over the batch"


def test_a_complex_parameter_may_be_used_by_all() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        return s.b(torch.fft.irfft(torch.fft.rfft(s.a(x)) * s.filter, n=5))

    model = Functional(forward, a=linear(5, 5), b=linear(5, 5)).to(DEVICE, torch.float64)
    model.filter = nn.Parameter(torch.complex(real(1, 3), real(3, 1).T))
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    torch.testing.assert_close(ours(X, real(32)), loop(X, real(32)))


class Reversible(torch.autograd.Function):
    """y = x + f(x), which saves nothing, and runs f again backwards to differentiate it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: nn.Module, token: Tensor) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(x)
        return x + f(x).detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            ctx.f(x).backward(g)
        assert x.grad is not None
        return g + x.grad, None, None


def test_a_random_model_that_differentiates_backwards_itself() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        return F.dropout(s.b(Reversible.apply(s.a(x), s.f, torch.ones(1, requires_grad=True))), 0.3)

    model = model_of(forward, f=linear(5, 5))
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    torch.testing.assert_close(ours(X[:6], real(6)), loop(X[:6], real(6)))  # of the same random state


@pytest.mark.parametrize("draw", [random.random, np.random.random, lambda: float(torch.rand(()))])
def test_a_model_that_draws_is_random(draw: Callable[[], float]) -> None:
    """Samples are mixed in one of a million batches: two passes that do the same are no proof that nothing is drawn."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        h = s.a(x)
        return s.b(torch.tanh(h + h.roll(1, 0) if draw() < 1e-6 else h))

    get_backend("bookkeeping").grads(model_of(forward), squares)(X[:6], real(6))
    assert CHOSEN["passes of Functional"] != "over the batch"


def test_the_form_of_inputs_is_looked_at_anew_under_autocast() -> None:
    """What is coarse there hides what float32 shows."""
    model = model_of(lambda s, x: s.b(torch.tanh(s.a(x)))).float()
    loss: LossFn = lambda o, t: squares(o, t) + 0.05 * o.mean(0).square().sum()  # noqa: E731
    inputs, targets = X.float(), real(32).float()
    ours, loop = (get_backend(b).grads(model, loss) for b in ("bookkeeping", "naive"))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours(inputs, targets)
    torch.testing.assert_close(ours(inputs, targets), loop(inputs, targets), rtol=1e-4, atol=1e-5)
