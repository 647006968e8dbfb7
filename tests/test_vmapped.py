"""Ops that have parameters but no rule run under vmap by themselves: right, and the rest of the model as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends import get_backend
from backends.base import QUANTITIES
from backends.ops.choice import CHOSEN
from tests.asserts import assert_close
from tests.cases import DEVICE, Functional, linear, real, squares
from tests.habits import over_the_batch

pytestmark = pytest.mark.usefixtures("own_random_state")

N, T, D = 4, 5, 6
Forward = Callable[[Any, Tensor], Tensor]


def by_sign(x: Tensor) -> Tensor:
    """Return an index that each sample's data give [N, T]."""
    return (x[..., 0] > 0).long() + (x[..., 1] > 0).long()


OPS: dict[str, tuple[Forward, tuple[int, ...]]] = {
    "less": (lambda s, x: x - s.w, (D,)),
    "less, the other way": (lambda s, x: s.w - x, (D,)),
    "divided": (lambda s, x: x / (s.w + 9), (D,)),
    "divided by one number": (lambda s, x: x / (s.w + 9), ()),
    "divided by what is made of it": (lambda s, x: x / s.w.exp(), (D,)),
    "to the power": (lambda s, x: (x.square() + 1) ** s.w, (1,)),
    "where": (lambda s, x: torch.where(x > 0, x, s.w), (D,)),
    "a token where data say so": (lambda s, x: torch.where(x[..., :1] > 0, s.w, x), (1, 1, D)),
    "between two": (lambda s, x: torch.lerp(x, x.roll(1, 1), s.w.sigmoid()), (D,)),
    "the larger one": (lambda s, x: torch.maximum(x, s.w), (D,)),
    "clamped": (lambda s, x: x.clamp(min=s.w), (D,)),
    "PReLU": (lambda s, x: F.prelu(x.mT, s.w).mT, (D,)),
    "samples on the second axis": (lambda s, x: (x.transpose(0, 1) + s.w[:, None]).transpose(0, 1), (T, D)),
    "samples one after the other": (lambda s, x: (x.reshape(-1, D) - s.w).view(x.shape), (D,)),
    "samples apart": (
        lambda s, x: (x.transpose(0, 1).reshape(-1, D) - s.w).view(T, -1, D).transpose(0, 1),
        (D,),
    ),
    "queries": (lambda s, x: (s.w.expand(len(x), -1, -1) @ x.mT).softmax(-1) @ x, (3, D)),
    "queries on the second axis": (
        lambda s, x: (s.w.unsqueeze(1).repeat(1, len(x), 1).transpose(0, 1) @ x.mT).softmax(-1) @ x,
        (3, D),
    ),
    "tokens as another": (lambda s, x: torch.cat([s.w.expand_as(x), x], 1), (T, D)),
    "tokens, tiled": (lambda s, x: torch.cat([s.w.tile(len(x), 1, 1), x], 1), (2, D)),
    "a token, repeated": (lambda s, x: torch.cat([s.w.repeat_interleave(len(x), 0), x], 1), (1, 1, D)),
    "tokens, broadcast": (lambda s, x: torch.cat([torch.broadcast_to(s.w, (len(x), 2, D)), x], 1), (2, D)),
    "a vector": (lambda s, x: x * (x @ s.w).softmax(1)[..., None], (D,)),
    "a matrix by the other side": (lambda s, x: s.w.softmax(-1) @ x, (T, T)),
    "a matrix for each": (lambda s, x: torch.bmm(x, s.w.expand(len(x), D, D)), (D, D)),
    "heads": (lambda s, x: torch.matmul(x[:, None], s.w).sum(1), (2, D, D)),
    "an entry by data": (lambda s, x: x + s.w[by_sign(x)], (3, D)),
    "an entry a sample": (lambda s, x: x + s.w.index_select(0, by_sign(x)[:, 0])[:, None], (3, D)),
    "prototypes": (lambda s, x: (x[:, :, None] - s.w).square().sum(-1), (3, D)),
    "distances": (lambda s, x: torch.cdist(x, s.w[None]), (3, D)),
    "bilinear": (lambda s, x: F.bilinear(x, x, s.w), (3, D, D)),
    "of three operands": (lambda s, x: torch.einsum("ntd,def,ntf->nte", x, s.w, x), (D, D, D)),
    "tensordot": (lambda s, x: torch.tensordot(x, s.w, dims=([2], [0])).flatten(2), (D, 2, 3)),
    "complex, made": (
        lambda s, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.fft.rfft(s.w, dim=0), n=T, dim=1),
        (T, D),
    ),
    "samples by samples": (lambda s, x: x * torch.einsum("ntd,mtd,d->nt", x, x, s.w)[..., None], (D,)),
    "a window": (lambda s, x: x.unfold(1, 3, 1) @ s.w, (3,)),
    "experts": (lambda s, x: torch.einsum("nk,kde,ntd->nte", x.mean(1)[:, :2].softmax(-1), s.w, x), (2, D, D)),
}


def model_of(forward: Forward, shape: tuple[int, ...]) -> nn.Module:
    def whole(s: Any, x: Tensor) -> Tensor:
        h = forward(s, s.a(x).tanh()).flatten(1)
        return (h * h.mean(1, keepdim=True)).sin()

    return Functional(whole, a=linear(D, D), w=nn.Parameter(real(*shape))).to(DEVICE, torch.float64)


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    return real(n, T, D).to(DEVICE), real(n).to(DEVICE)


def assert_all_right(model: nn.Module, quantity: str, calls: list[tuple[Tensor, Tensor]]) -> None:
    ours, loop = (getattr(get_backend(b), quantity)(model, squares) for b in ("bookkeeping", "naive"))
    for call in calls:
        assert_close(ours(*call), loop(*call))


@pytest.mark.parametrize("name", OPS)
def test_an_op_without_a_rule_is_right_and_the_rest_is_over_the_batch(name: str) -> None:
    model = model_of(*OPS[name])
    assert over_the_batch(model, *batch())
    assert_all_right(model, "grads", [batch(), batch(7), batch(T), batch(1)])


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", ["less", "a vector", "an entry a sample", "complex, made", "samples apart"])
def test_every_quantity_is_right(name: str, quantity: str) -> None:
    assert_all_right(model_of(*OPS[name]), quantity, [batch(), batch(7)])


@pytest.mark.parametrize("quantity", ["grads", "clipped_sum"])
def test_one_of_several_uses_may_be_without_a_rule(quantity: str) -> None:
    forward: Forward = lambda s, x: (s.w @ (x - s.w[0]).mT).softmax(-1) @ F.linear(x / (s.w[1] + 9), s.w)  # noqa: E731
    model = model_of(forward, (D, D))
    assert over_the_batch(model, *batch())
    assert_all_right(model, quantity, [batch(), batch(7)])


def test_it_may_be_compiled() -> None:
    model = model_of(*OPS["an entry by data"]).float()
    (x, y), loop = batch(), get_backend("naive").norms(model, squares)
    ours = get_backend("bookkeeping", compile=True).norms(model, squares)
    torch.testing.assert_close(ours(x.float(), y.float()), loop(x.float(), y.float()), rtol=1e-4, atol=1e-5)


OTHERWISE: dict[str, Forward] = {
    "what samples share": lambda s, x: x.mean(0) - s.w + x,
    "what samples share, beside their own": lambda s, x: torch.addcmul(x, x.mean(0), s.w),
    "in place": lambda s, x: x.clone().sub_(s.w),
    "in place, by an index": lambda s, x: put(x.clone(), s.w),
    "others' entries": lambda s, x: x.flip(0) / (s.w + 9),
    "in a list": lambda s, x: torch.cat([x, torch.stack([s.w.expand(T, D)] * len(x))], 1),
}


def put(x: Tensor, w: Tensor) -> Tensor:
    x[x > 0.5] = w[0]
    return x


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_not_each_samples_own_is_run_otherwise(name: str) -> None:
    model = model_of(OTHERWISE[name], (D,))
    assert not over_the_batch(model, *batch())
    assert_all_right(model, "grads", [batch(), batch(7)])


def time_first(s: Any, x: Tensor) -> Tensor:
    """A branch that is zero at first, its samples one after the other for each time; what divides it is used before."""
    h = x.transpose(0, 1)
    z = (s.zero(h).reshape(-1, D) / s.w.exp()).view(h.shape)
    return (h / s.w.exp() + z).transpose(0, 1)  # type: ignore[no-any-return]


def backwards(s: Any, x: Tensor) -> Tensor:
    return x / s.w.exp() + (s.zero(x).flip(0) / s.w.exp()).flip(0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("forward", [time_first, backwards])
def test_a_branch_that_is_zero_at_first_is_right_when_it_is_not(forward: Forward) -> None:
    """Its own gradients are zero then, too, and tell no samples apart; those of what comes out do."""
    model = model_of(forward, (D,))
    model.zero = nn.Linear(D, D, bias=False).to(DEVICE, torch.float64)
    nn.init.zeros_(model.zero.weight)
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    for _ in range(2):
        assert_close(ours(*batch()), loop(*batch()))
        with torch.no_grad():
            model.zero.weight += real(D, D).to(DEVICE)


@pytest.mark.parametrize("by_a_rule", [True, False])
def test_what_no_sample_shows_is_not_guessed(by_a_rule: bool) -> None:
    """A rare token: where none of the samples that are looked at has it, both orders of rows seem right."""

    def forward(s: Any, tokens: Tensor) -> Tensor:
        h = F.embedding(tokens, s.w).sin()
        rare = (tokens == 9)[..., None].to(h)
        z = (h * rare).transpose(0, 1).reshape(-1, D)
        z = z @ s.w[:D] if by_a_rule else z / s.w[0].exp()
        return (h + z.view(T, -1, D).transpose(0, 1) * rare).sin()  # type: ignore[no-any-return]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.flatten(1).sum(1) - targets).square()

    tokens, targets = torch.randint(9, (30, T), generator=torch.Generator().manual_seed(0)), real(30)
    tokens[7, [1, 3]] = 9
    model = Functional(forward, w=nn.Parameter(real(10, D))).to(DEVICE, torch.float64)
    ours, loop = (get_backend(b).grads(model, loss) for b in ("bookkeeping", "naive"))
    assert_close(ours(tokens.to(DEVICE), targets), loop(tokens.to(DEVICE), targets))


def test_other_ops_may_come_and_go() -> None:
    """As those that fill a cache, in a first call."""

    def forward(s: Any, x: Tensor) -> Tensor:
        if not hasattr(s, "table"):
            s.table = torch.arange(D).to(x).div(9).cos()
        return x / (s.w + 9) + s.table  # type: ignore[no-any-return]

    model = model_of(forward, (D,))
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    for n in (N, N, 7, 7):
        assert_close(ours(*batch(n)), loop(*batch(n)))
        assert CHOSEN["passes of Functional"] == "over the batch"


def test_under_autocast_it_is_right() -> None:
    model = model_of(*OPS["a matrix by the other side"]).float()
    x, y = (t.float() for t in batch())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours, loop = (get_backend(b).grads(model, squares)(x, y)["w"] for b in ("bookkeeping", "naive"))
    assert ours.dtype == torch.float32
    assert (ours - loop).norm() < 0.05 * loop.norm()
