"""Tensors that are made of parameters alone: what is made of them is right, and as cheap as an ordinary step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from backends import get_backend
from backends.base import QUANTITIES, own_copy
from backends.ops.passes import Passes
from backends.ops.ways import Ways
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


def merged(s: Any, x: Tensor) -> Tensor:
    """LoRA (Hu et al. 2021), as DoRA has it: with a direction and a magnitude of its own (Liu et al. 2024)."""
    w = s.frozen + s.b(s.a(torch.eye(12, dtype=x.dtype, device=x.device))).T  # 3 · 4, and 4 · 3
    norm = torch.linalg.norm(w, dim=1).detach()
    return F.linear(x, (s.m / norm)[:, None] * w)


def put(s: Any, x: Tensor) -> Tensor:
    w = torch.zeros(5, 5, dtype=x.dtype, device=x.device)
    w[[0, 1, 2, 3, 4], [4, 0, 2, 1, 3]] = s.a.bias
    return F.linear(x, w)


def scaled(s: Any, x: Tensor) -> Tensor:
    """IA³ (Liu et al. 2022): a scale [1, D] of vectors, and of their mean."""
    return s.a((x * s.p).tanh().mean(1)) * s.p


def relative(s: Any, x: Tensor) -> Tensor:
    """Swin's biases: a row of a table for how far apart two places are."""
    index = (torch.arange(2)[:, None] - torch.arange(2) + 1).flatten()
    bias = s.b.weight[index.to(x.device)].view(2, 2, -1).permute(2, 0, 1)  # [5, 2, 2]
    q = s.a(x).transpose(1, 2)[..., None]  # [N, 5, 2, 1]
    shown = (q @ q.mT + bias[None]).softmax(-1) @ q
    return F.scaled_dot_product_attention(q, q, shown, attn_mask=bias[None])


def prompt(s: Any, x: Tensor) -> Tensor:
    """Prompt tuning: what is the same for all is repeated for each."""
    tokens = s.b(torch.arange(3, device=x.device)[None])
    return s.a(torch.cat([tokens.tanh().repeat(len(x), 1, 1), s.p.expand(len(x), -1, -1), x], 1).sin())


def of_coordinates(s: Any, x: Tensor) -> Tensor:
    """A net of what no sample has, which changes its own in place."""
    places = torch.linspace(-1, 1, 10, dtype=x.dtype, device=x.device).view(1, 2, 5)
    return s.a(x + F.relu(s.b(places), inplace=True))


def fused(s: Any, x: Tensor) -> Tensor:
    return s.a(torch.addcmul(s.b.bias, s.b.weight[0], x.sin(), value=0.5))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a standardised convolution": (lambda: Functional(standardised, c=nn.Conv2d(2, 4, 3)), (2, 6, 6)),
    "a part, and the whole": (lambda: Functional(part_and_whole, a=linear(5, 5)), (2, 5)),
    "made of two": (lambda: Functional(made_of_two, a=linear(5, 5), b=linear(5, 5)), (2, 5)),
    "used twice": (lambda: Functional(twice, a=nn.Linear(5, 5, bias=False)), (2, 5)),
    "chunks": (lambda: Functional(chunks, a=nn.Linear(5, 5, bias=False)), (2, 5)),
    "1 + w": (lambda: Functional(norm_by_hand, b=nn.RMSNorm(5)), (2, 5)),
    "positions": (lambda: Functional(positions, a=linear(5, 5), b=nn.Embedding(9, 5)), (2, 5)),
    "positions [1, ...]": (
        lambda: Functional(lambda s, x: s.a(x.sin() + (2 * s.p).tanh()), a=linear(5, 5), p=nn.Parameter(real(1, 2, 5))),
        (2, 5),
    ),
    "merged": (
        lambda: Functional(
            merged, a=linear(12, 4), b=linear(4, 12), m=nn.Parameter(real(12)), frozen=nn.Parameter(real(12, 12), False)
        ),
        (2, 12),
    ),
    "put in a matrix": (lambda: Functional(put, a=linear(5, 5)), (2, 5)),
    "a scale [1, D]": (lambda: Functional(scaled, a=linear(5, 5), p=nn.Parameter(real(1, 5))), (2, 5)),
    "relative places": (lambda: Functional(relative, a=linear(5, 5), b=nn.Embedding(3, 5)), (2, 5)),
    "a prompt": (
        lambda: Functional(prompt, a=linear(5, 5), b=nn.Embedding(3, 5), p=nn.Parameter(real(1, 1, 5))),
        (2, 5),
    ),
    "of coordinates": (lambda: Functional(of_coordinates, a=linear(5, 5), b=linear(5, 5)), (2, 5)),
    "with a buffer": (
        lambda: Functional(
            lambda s, x: F.linear(x, s.a.weight * s.n.running_var), a=linear(5, 5), n=nn.BatchNorm1d(5, affine=False)
        ).eval(),
        (2, 5),
    ),
    "a token, twice as wide": (
        lambda: Functional(
            lambda s, x: s.a(x.sin() + s.p.repeat(1, 1, 2)), a=linear(6, 5), p=nn.Parameter(real(1, 1, 3))
        ),
        (2, 6),
    ),
    "a net of a token": (
        lambda: Functional(
            lambda s, x: s.a(x + s.b(s.p).tanh()), a=linear(5, 5), b=linear(5, 5), p=nn.Parameter(real(1, 5))
        ),
        (2, 5),
    ),
    "addcmul": (lambda: Functional(fused, a=linear(5, 5), b=linear(5, 5)), (2, 5)),
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
    """The gradient by an op in place, which has no rule and does not run under vmap by itself, would not be there."""
    model = Functional(lambda s, x: s.a(x) + x.clone().atan2_(2 * s.a.bias), a=linear(5, 5)).to(DEVICE, torch.float64)
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


@pytest.mark.parametrize(
    "share",
    [
        lambda x: x.mean(),
        lambda x: x.amax(),
        lambda x: (x > 0).sum(),
        lambda x: 1 / len(x),
        lambda x: x[0, 0, 0],
    ],
    ids=["mean", "largest", "how many", "one of N", "the first"],
)
@pytest.mark.parametrize("size", [1, 1e-4])
def test_what_is_made_of_samples_too_is_not_shared_by_them(share: Callable[[Tensor], Any], size: float) -> None:
    """In float32, where a gradient may be a hundredth apart; the loss is linear, so nothing else shows it."""
    model = Functional(lambda s, x: F.linear(x, s.a.weight * (1 + size * share(x))), a=nn.Linear(5, 5, bias=False))
    inputs, targets = real(6, 2, 5).float().to(DEVICE), real(6).float().to(DEVICE)
    ways = Ways(Passes(own_copy(model.to(DEVICE, torch.float32)), lambda o, t: o.flatten(1).sum(1) * t))
    seen = size == 1 or share(inputs) != 1 / len(inputs)  # which is told by a few samples only
    assert (ways.way(inputs, targets).name != "over the batch") == seen


def test_what_a_made_weight_was_made_with_is_kept_until_it_is_wanted() -> None:
    """Of groups, gradients are wanted after all has been run, and buffers have been given back."""

    def forward(s: Any, x: Tensor, mask: Tensor) -> Tensor:
        h = F.linear(x, s.a.weight * s.n.running_var)
        return h.mean(1) if mask.all() else (h * mask[..., None]).sum(1)  # type: ignore[no-any-return]

    model = Functional(forward, a=linear(5, 5), n=nn.BatchNorm1d(5, affine=False)).to(DEVICE, torch.float64).eval()
    (x, mask), targets = (real(6, 2, 5).to(DEVICE), torch.ones(6, 2, device=DEVICE)), real(6).to(DEVICE)
    mask[[1, 4], 1] = 0
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    assert_close(ours((x, mask), targets), loop((x, mask), targets))
