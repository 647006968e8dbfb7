"""Where what a weight is made of is not parameters alone, and where it goes back to them in a way of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends import get_backend
from backends.base import QUANTITIES
from tests.asserts import assert_close
from tests.cases import DEVICE, Functional, linear, real, squares
from tests.habits import over_the_batch

pytestmark = pytest.mark.usefixtures("own_random_state")


def held_against_the_loop(model: nn.Module, quantity: str, *batches: Any, loss: Any = squares, **options: Any) -> None:
    ours, loop = (getattr(get_backend(b), quantity)(model, loss, **options) for b in ("bookkeeping", "naive"))
    for inputs, targets in batches:
        assert_close(ours(inputs, targets), loop(inputs, targets))


def put_in(s: Any, kind: Tensor) -> Tensor:
    w = s.w.clone()
    w[0] = s.d[0] * kind.max()
    return w


def changed_behind(s: Any, kind: Tensor) -> Tensor:
    scale = s.w.detach().clone()
    scale.data.mul_(1 + kind.max())
    return s.w * scale  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "chosen",
    [
        lambda s, kind: s.w * 1.0 + s.d * kind.max(),
        lambda s, kind: s.w * (1 + (kind > 1).sum()),
        lambda s, kind: torch.stack([s.w, s.d]).index_select(0, kind[:1].clamp(max=1))[0],
        lambda s, kind: torch.stack([s.w, s.d])[kind[0].clamp(max=1)],
        lambda s, kind: s.w + s.d.clone().mul_(kind.amax()),
        lambda s, kind: s.w * (1 + torch.from_numpy(kind.cpu().numpy()).to(s.w.device).max()),
        put_in,
        changed_behind,
        lambda s, kind: s.w.clone().index_add_(0, kind[:1], s.d[:1]),
    ],
)
def test_a_weight_that_data_has_chosen_is_no_weight_of_all(chosen: Callable[[Any, Tensor], Tensor]) -> None:
    """In the first batch it is the same for all."""
    model = Functional(lambda s, x, kind: F.linear(x, chosen(s, kind)), w=nn.Parameter(real(5, 5)))
    model.d = nn.Parameter(real(5, 5) ** 2)
    x, targets = real(6, 2, 5).to(DEVICE), real(6).to(DEVICE)
    kinds = [torch.tensor(k, device=DEVICE) for k in ([0] * 6, [0, 1, 0, 0, 2, 0], [1] * 6)]
    held_against_the_loop(model.to(DEVICE, torch.float64), "grads", *(((x, kind), targets) for kind in kinds))


@pytest.mark.parametrize("draw", [F.dropout, lambda w: w * F.dropout(torch.ones_like(w)), torch.bernoulli])
def test_a_weight_that_is_drawn_is_drawn_for_each(draw: Callable[[Tensor], Tensor]) -> None:
    model = Functional(lambda s, x: F.linear(x, draw(s.w.sigmoid())), w=nn.Parameter(real(5, 5))).to(DEVICE)
    assert not over_the_batch(model.double(), real(6, 2, 5).to(DEVICE), real(6).to(DEVICE))


class Capped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-1e-3, 1e-3)


def hooked(w: Tensor) -> Tensor:
    w = w * 1
    w.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    return w


@pytest.mark.parametrize("cap", [Capped.apply, hooked], ids=["function", "hook"])
def test_what_is_taken_back_need_not_be_linear(cap: Callable[[Tensor], Tensor]) -> None:
    model = Functional(
        lambda s, x: F.linear(x, cap(s.w)).mean(1, keepdim=True) * 30, w=nn.Parameter(real(900, 900) / 30)
    )
    batch = real(12, 900).to(DEVICE), real(12).to(DEVICE)
    held_against_the_loop(model.to(DEVICE, torch.float64), "clipped_sum", batch, max_norm=1.0)


def test_a_small_clipped_sum_is_not_lost_in_half_precision() -> None:
    model = Functional(lambda s, x: F.linear(x.half(), s.w.half()).float(), w=nn.Parameter(real(900, 900) / 30))
    model, batch = model.to(DEVICE, torch.float32), (real(8, 900).to(DEVICE).float(), real(8).to(DEVICE).float())
    ours, loop = (get_backend(b).clipped_sum(model, squares, max_norm=1e-6)(*batch) for b in ("bookkeeping", "naive"))
    assert (ours["w"] - loop["w"]).norm() < 0.01 * loop["w"].norm()


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_half_precision_goes_back_to_parameters(quantity: str) -> None:
    model = Functional(
        lambda s, x: F.linear(x * (1 + s.w) + s.p[:3], s.a.weight),
        w=nn.Parameter(real(5)),
        p=nn.Parameter(real(7, 5)),
        a=linear(),
    )
    model, batch = model.to(DEVICE).half(), (real(6, 3, 5).to(DEVICE).half(), real(6).to(DEVICE).half())
    ours, loop = (getattr(get_backend(b), quantity)(model, squares)(*batch) for b in ("bookkeeping", "naive"))
    for name, right in loop.items() if isinstance(loop, dict) else [("", loop)]:
        assert ((ours[name] if name else ours) - right).norm() <= 1e-2 * right.norm()


def test_a_sample_that_attends_to_nothing_is_right() -> None:
    def forward(s: Any, x: Tensor, length: Tensor) -> Tensor:
        beyond = torch.arange(3, device=x.device) >= length[:, None]
        mask = s.b.expand(len(x), 3, 3).masked_fill(beyond[:, None], -torch.inf)
        shared = F.scaled_dot_product_attention(
            x, x, x, attn_mask=(2 * s.b)[0] + torch.ones_like(s.b)[0].tril(-1).log()
        )
        return F.scaled_dot_product_attention(s.a(x), x, x, attn_mask=mask) + shared

    model = Functional(forward, a=linear(5, 5), b=nn.Parameter(real(1, 3, 3))).to(DEVICE, torch.float64)
    x, targets = real(6, 3, 5).to(DEVICE), real(6).to(DEVICE)
    lengths = [torch.tensor(n, device=DEVICE) for n in ([3, 2, 1, 3, 3, 2], [3, 0, 1, 3, 3, 2])]
    held_against_the_loop(model, "norms", *(((x, length), targets) for length in lengths))
    assert over_the_batch(model, (x, lengths[1]), targets)


class ByItsModule(torch.autograd.Function):
    """It reads, backwards, what its module holds then."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, module: Any) -> Tensor:
        ctx.module = module
        return w * module.factor

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.module.factor, None


@pytest.mark.parametrize("change", ["a buffer", "an attribute", "a number"])
def test_what_another_group_changes_does_not_matter(change: str) -> None:
    def forward(s: Any, x: Tensor, mask: Tensor) -> Tensor:
        whole = bool(mask.all())
        if change == "a buffer":
            s.scale.fill_(1.0 if whole else 2.0)
        elif change == "an attribute":
            s.other.data.fill_(1.0 if whole else 2.0)
        else:
            s.factor = 1.0 if whole else 2.0
        weights = {
            "a buffer": lambda: s.a.weight * s.scale,
            "an attribute": lambda: s.a.weight * s.other,
            "a number": lambda: ByItsModule.apply(s.a.weight, s),
        }
        h = F.linear(x, weights[change]())
        return (h * mask[..., None]).sum(1)  # type: ignore[no-any-return]

    model = Functional(forward, a=linear(5, 5))
    model.register_buffer("scale", torch.ones(5))
    model = model.to(DEVICE, torch.float64)
    model.other = torch.ones(5, dtype=torch.float64, device=DEVICE)  # type: ignore[assignment]
    x, masks, targets = (
        real(6, 2, 5).to(DEVICE),
        [torch.ones(6, 2, device=DEVICE) for _ in range(3)],
        real(6).to(DEVICE),
    )
    masks[1][:, 1], masks[2][[1, 4], 1] = 0, 0
    held_against_the_loop(model, "norms", *(((x, mask), targets) for mask in masks))
