"""How the passes are run: what a model may do without being got wrong, and the cheapest way that is right."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from backends import get_backend
from backends.base import QUANTITIES, own_copy
from backends.ops.passes import Passes
from backends.ops.ways import Ways
from backends.running import kept_buffers
from tests.asserts import assert_close
from tests.cases import DEVICE, Functional, N, linear, real, squares
from tests.habits import assert_right, by_its_values, differentiated_directly, habit, itself, over_the_batch, way_of

pytestmark = pytest.mark.usefixtures("own_random_state")


def nested(transform: Callable[..., Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda s, x: transform(lambda z: s.a(z).sin(), x)


HABITS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "attention": lambda s, x: s.m(y := x[:, None], y, y)[0],
    "a hook": lambda s, x: doubled(s.a(x)).sin(),
    "a hook, then in place": lambda s, x: doubled(s.a(x)).tanh_(),
    "in place on a covered op's output": lambda s, x: s.a(s.a(x).relu_()).mul_(2),
    "a weight in a list": lambda s, x: F.linear(x, s.kept[0]).sin(),
    "an input that is a parameter": lambda s, x: s.a(s.b.weight).sin() @ x.mT,
    "an input that is the same for all": lambda s, x: x * s.a(torch.ones_like(x)).sin(),
    "a bias that is computed": lambda s, x: F.linear(x, s.a.weight, s.b(x)[0]).sin(),
    "statistics of each sample's own": lambda s, x: F.batch_norm(x, x[0], x[0].square(), s.a.bias).sin(),
    "a weight once by a rule, once not": lambda s, x: s.a(x).sin() @ s.a.weight.T.sin(),
    "vmap": lambda s, x: torch.vmap(lambda c: s.a(c * x).sin())(torch.arange(3, device=x.device).to(x)).sum(0),
    "vmap over weights": lambda s, x: torch.vmap(lambda w: (x * w).sum(-1))(s.a.weight).mT.sin(),
    "torch.func.grad": nested(lambda f, x: torch.func.grad(lambda z: f(z).sum())(x)),
    "torch.func.jvp": nested(lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1]),
}


def doubled(y: Tensor) -> Tensor:
    if y.requires_grad:
        y.register_hook(lambda g: g * 2 - g.mean())
    return y


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")  # torch's own, in forward mode
@pytest.mark.parametrize("name", HABITS)
def test_models_may_do_what_they_like(name: str) -> None:
    assert_right(habit(HABITS[name]), real(N, 5), real(N))


def test_attention_has_rules() -> None:
    assert not differentiated_directly(habit(HABITS["attention"]), real(N, 5), real(N))


LAYOUTS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], bool]] = {
    "samples first": (lambda s, x: s.a(x).sin(), True),
    "samples second": (lambda s, x: s.a(x.transpose(0, 1)).sin().transpose(0, 1), True),
    "an embedding that all share": (
        lambda s, x: s.a(x + s.e(torch.arange(x.shape[1], device=x.device)[None])).sin(),
        True,
    ),
    "a parameter that all share": (lambda s, x: s.a(x + s.shared).sin(), True),
    "a token of its own": (lambda s, x: s.a(torch.cat([s.shared.expand(len(x), -1, -1), x], 1)).sin(), True),
    "samples third": (lambda s, x: s.a(x.permute(1, 2, 0).mT).sin().transpose(0, 1), True),
    "positions of all samples in a row": (lambda s, x: s.a(x.flatten(0, 1)).sin().view_as(x), True),
    "samples of all positions in a row": (
        lambda s, x: s.a(x.transpose(0, 1).flatten(0, 1)).sin().view(x.shape[1], x.shape[0], 5).transpose(0, 1),
        True,
    ),
    "samples in another order": (lambda s, x: s.a(x.flip(0)).sin().flip(0), False),
    "samples sorted": (lambda s, x: s.a(x[x[:, 0, 0].argsort()]).sin(), False),
    "samples that see each other": (lambda s, x: s.a(x - x.mean(0)).sin(), False),
    "dropout": (lambda s, x: s.a(x).sin() + 0 * F.dropout(x), True),
    "other random numbers": (lambda s, x: s.a(x).sin() + 0 * torch.rand_like(x), False),
    "a little of another sample": (lambda s, x: s.a(x).sin() + 1e-4 * s.a(x.flip(0).cos()).flip(0), False),
    "the largest of all samples": (lambda s, x: s.a(x / x.abs().amax().clamp(min=9.0)).sin(), False),
}


@pytest.mark.parametrize("positions", [2, 3, 4, 6])  # 3 and 4 are how many samples are looked at; 6 are in the batch
@pytest.mark.parametrize("name", LAYOUTS)
def test_passes_are_an_ordinary_steps_where_that_is_the_same(name: str, positions: int) -> None:
    forward, same = LAYOUTS[name]
    model = Functional(forward, a=linear(5, 5), b=linear(5, 5), e=nn.Embedding(6, 5))
    model.shared = nn.Parameter(real(1, positions if name == "a parameter that all share" else 1, 5))
    model.to(DEVICE, torch.float64)
    inputs, targets = real(6, positions, 5), real(6)
    assert_right(model, inputs, targets)
    assert over_the_batch(model, inputs, targets) in ((same, False) if positions in (3, 4) else (same,))


@pytest.mark.parametrize(("share", "dtype"), [(1e-4, torch.float32), (0.02, torch.bfloat16), (0.002, torch.float16)])
def test_a_little_of_another_sample_is_seen_in_few_bits_too(share: float, dtype: torch.dtype) -> None:
    model = Functional(lambda s, x: s.b((h := s.a(x)) + share * h.flip(0)).sin(), a=linear(5, 5), b=linear(5, 5))
    model.to(DEVICE, dtype)
    assert not over_the_batch(model, real(6, 3, 5).to(dtype), real(6).to(dtype))
    model._forward = lambda s, x: s.b(s.a(x)).sin()
    assert over_the_batch(model, real(6, 3, 5).to(dtype), real(6).to(dtype))


def test_a_first_call_draws_what_later_ones_draw() -> None:
    fn = get_backend("bookkeeping").grads(habit(lambda s, x: s.a(F.dropout(x)).sin()), squares)
    found = []
    for _ in range(2):
        torch.default_generator.manual_seed(1)
        found.append(fn(real(6, 5), real(6)))
    assert_close(*found)


def test_a_layout_that_depends_on_more_than_the_form_is_seen() -> None:
    model = habit(lambda s, x: s.a(x[None])[0].sin() if len(x) > 4 else s.a(x).sin())
    assert_right(model, real(6, 5), real(6))
    assert not over_the_batch(model, real(6, 5), real(6))


class Times(torch.autograd.Function):
    """A product that no torch function mode sees."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum_to_size(w.shape)


class Doubled(torch.autograd.Function):
    """A product by two that has no rule for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


def out_of_sight(s: nn.Module, x: Tensor) -> Tensor:
    return Times.apply(s.b(x), s.kept[0][0] * 1)  # type: ignore[no-any-return]


def checkpointed(s: nn.Module, x: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(lambda z: s.a(z).sin(), s.b(x), use_reentrant=reentrant)  # type: ignore[no-any-return]


def by_any_value(s: nn.Module, x: Tensor) -> Tensor:
    """Go another way where any sample says so; of the test's batch, only the third one does."""
    return s.a(x).sin() if bool((x.detach()[:, 0] < LATE).all()) else s.b(x)


def by_a_list(s: nn.Module, x: Tensor) -> Tensor:
    return s.a(x).sin() if max(x.detach()[:, 0].tolist()) < LATE else s.b(x)


def by_a_buffer(s: nn.Module, x: Tensor) -> Tensor:
    return s.a(x).sin() if s.limit > 0 else s.b(x)


LATE = 50.0


WAYS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "plain": (lambda s, x: s.a(x).sin(), "over the batch"),
    "a function without a rule for vmap": (lambda s, x: Doubled.apply(s.a(x)), "over the batch"),
    "samples in another order": (lambda s, x: s.a(x.flip(0)).sin().flip(0), "under vmap"),
    "control flow by values": (by_its_values, "one by one"),
    "control flow by values of another sample": (by_any_value, "one by one"),
    "control flow by values read as a list": (by_a_list, "one by one"),
    "control flow by a value that samples share": (by_a_buffer, "over the batch"),
    "a parameter used out of sight": (out_of_sight, "one by one"),
    "a checkpoint": (partial(checkpointed, reentrant=False), "one by one"),
    "a reentrant checkpoint": (partial(checkpointed, reentrant=True), "one by one"),
}


@pytest.mark.parametrize("name", WAYS)
def test_passes_are_run_the_cheapest_way_that_is_right(name: str) -> None:
    forward, way = WAYS[name]
    model = habit(forward)
    model.kept = [model.a.weight] if name != "a parameter used out of sight" else [model.a.bias]
    model.register_buffer("limit", torch.ones((), device=DEVICE))
    inputs, targets = real(6, 5), real(6)
    inputs[2, 0] = 2 * LATE  # a sample that is not looked at
    for quantity in QUANTITIES:
        ours, loop = (getattr(get_backend(b), quantity)(model, squares) for b in ("bookkeeping", "naive"))
        assert_close(ours(inputs, targets), loop(inputs, targets))
    assert way_of(model, inputs, targets) == way


@pytest.mark.parametrize("product", [lambda a, x: a(x), lambda a, x: x @ a.weight], ids=["linear", "matmul"])
def test_vectors_in_any_order_are_multiplied_as_one_matrix(product: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """As in a step; by a weight without gradient torch would multiply N matrices where axes have been exchanged."""

    class Products(TorchDispatchMode):
        many = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.many += func is torch.ops.aten.bmm.default
            return func(*args, **(kwargs or {}))

    model = Functional(lambda s, x: product(s.a, x.transpose(0, 1)).sin().transpose(0, 1), a=linear(5, 5))
    model = model.to(DEVICE, torch.float64)
    passes, inputs, targets = Ways(Passes(own_copy(model), squares)), real(N, 7, 5), real(N)
    assert passes.way(inputs, targets).name == "over the batch"
    with Products() as products:
        passes(inputs, targets, itself)
    assert not products.many


def test_a_batch_that_fails_leaves_the_cheapest_way_as_it_was() -> None:
    model = habit(lambda s, x: s.a(x).sin())
    broken = False

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return squares(outputs, targets) / (None if broken else 1)  # type: ignore[operator]

    passes = Ways(Passes(own_copy(model), loss_fn))
    passes(real(6, 5), real(6), itself)
    broken = True
    with pytest.raises(TypeError):
        passes(real(6, 5), real(6), itself)
    broken = False
    passes(real(6, 5), real(6), itself)
    ((way, *_),) = passes.known.values()
    assert way.name == "over the batch"


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_what_samples_do_not_tell_is_not_asked_while_ops_are_recorded(
    quantity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit that is dead has no gradient to tell samples apart: it would be looked at anew in a few more calls."""
    model = Functional(lambda s, x: s.b(s.a(x).relu()), a=linear(5, 4), b=linear(4, 3)).to(DEVICE, torch.float64)
    nn.init.constant_(model.a.bias, -100.0)
    fn, inputs, targets = getattr(get_backend("bookkeeping"), quantity)(model, squares), real(6, 5), real(6)
    inputs, targets = inputs.to(DEVICE), targets.to(DEVICE)
    before = fn(inputs, targets)
    monkeypatch.setattr("backends.ops.ways.capturing", lambda like: True)
    monkeypatch.setattr("backends.ops.parts.capturing", lambda like: True)
    monkeypatch.setattr("backends.ops.ways.looked", lambda *call: pytest.fail("it asks for values"))
    assert_close(fn(inputs, targets), before)


def test_a_way_that_fails_has_kept_nothing() -> None:
    passes = Ways(Passes(linear(5, 4).to(DEVICE, torch.float64), squares))
    passes.extra = 1
    passes(real(3, 5).to(DEVICE), real(3).to(DEVICE), itself)
    assert passes.extra == 0


def test_an_input_that_is_changed_later_is_an_error_as_in_autograd() -> None:
    model = habit(lambda s, x: (h := x * 1, s.a(h), h.add_(1))[1])
    with pytest.raises(RuntimeError, match="inplace"):
        get_backend("bookkeeping").grads(model, squares)(real(N, 5), real(N))


def test_what_one_sample_has_counted_is_not_the_next_ones() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        s.calls += 1
        return by_its_values(s, x) / s.calls

    model = habit(forward)
    model.calls = 0
    norms = get_backend("bookkeeping").norms(model, squares)
    found = [norms(real(N, 5), real(N)) for _ in range(2)]
    assert_close(found[0], found[1])
    alone = [get_backend("naive").norms(model, squares)(real(N, 5)[i : i + 1], real(N)[i : i + 1]) for i in range(N)]
    assert_close(found[0], torch.cat(alone))


def test_buffers_may_come_and_go_in_a_pass() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        s.cache, s.calls = None, s.calls.add_(1)
        s.register_buffer("made", s.calls * 2)
        return s.a(x)

    model = Functional(forward, a=linear(5, 5)).to(DEVICE, torch.float64)
    model.register_buffer("cache", real(1))
    model.register_buffer("calls", real(1))
    before = model.calls.clone()
    with kept_buffers(model):
        model(real(N, 5))
    assert torch.equal(model.calls, before)
