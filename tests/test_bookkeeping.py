"""The bookkeeping backend: every rule and form against autograd, and what a model may do without being got wrong."""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backends import backend_class, get_backend
from backends.base import QUANTITIES, Unsupported, own_copy
from backends.batch import Batch
from backends.ops import persample
from backends.ops.choice import CHOSEN
from backends.ops.conv import Correlation, by_patches, by_places, grouped
from backends.ops.linear import Scattered
from backends.ops.pages import LARGE, Pool
from backends.ops.parts import InParts
from backends.ops.passes import Passes
from backends.ops.persample import Dense, Outer, PerSample, added
from backends.running import kept_buffers
from tests.asserts import assert_close
from tests.cases import DEVICE, Functional, N, linear, squares


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def real(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def forms() -> dict[str, PerSample]:
    """Return one of each form; the table has a row that a sample takes twice, and one that none takes."""
    conv = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
    return {
        "dense": Dense(real(N, 4, 5)),
        "dense, a scalar parameter": Dense(real(N)),
        "outer, one vector": Outer(real(N, 1, 4), real(N, 1, 5)),
        "outer, few vectors": Outer(real(N, 2, 40), real(N, 2, 50)),
        "outer, many vectors": Outer(real(N, 30, 4), real(N, 30, 5)),
        "table": Scattered(torch.tensor([[0, 1, 1], [2, 0, 3], [3, 3, 3]], device=DEVICE), real(N, 3, 5), 6),
        "convolution": Correlation(real(N, 2, 4, 9, 8), real(N, 2, 6, 5, 4), (6, 4, 3, 3), **conv, groups=1),
        "convolution, small images": Correlation(
            real(N, 1, 4, 9, 8), real(N, 1, 99, 5, 4), (99, 4, 3, 3), **conv, groups=1
        ),
        "convolution, groups": Correlation(real(N, 1, 4, 9, 8), real(N, 1, 6, 5, 4), (6, 2, 3, 3), **conv, groups=2),
        "sum": added([Dense(real(N, 4, 5)), Outer(real(N, 2, 4), real(N, 2, 5))], N, real(4, 5)),
        "sum of products": added([Outer(real(N, t, 4), real(N, t, 5)) for t in (2, 3)], N, real(4, 5)),
        "sum of nothing": added([], N, real(4, 5)),
    }


@pytest.mark.parametrize("at_a_time", [2**22, 1], ids=["all at once", "one at a time"])
@pytest.mark.parametrize("name", forms())
def test_every_form_agrees_with_its_own_rows(name: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(persample.AT_A_TIME, DEVICE.type, at_a_time)
    form, factors = forms()[name], real(N)
    rows = form.rows(slice(None))
    flat = rows.reshape(N, -1)
    assert rows.shape == (N, *form.shape)
    assert_close(form.grads(lambda shape, like: like.new_empty(shape)), rows)
    assert_close(form.rows(slice(1, 2)), rows[1:2])
    assert_close(form.compact().rows(slice(None)), rows)
    assert_close(form.squares(), flat.square().sum(1))
    assert_close(form.weighted(factors), (factors @ flat).view(form.shape))
    assert_close(form.variance(), rows.var(0, correction=0))
    assert_close(form.gram(), flat @ flat.T)


@pytest.mark.parametrize("name", [name for name in forms() if "convolution" in name and "groups" not in name])
def test_both_ways_of_a_convolution_agree(name: str) -> None:
    form = forms()[name]
    assert isinstance(form, Correlation)
    assert_close(by_patches(form), grouped(form))
    form.rows(slice(None))
    choices = get_backend("bookkeeping", chunk_size=2).choices()
    assert choices[f"{form.geometry()}, float64, {DEVICE.type}, 2 samples or more"] in ("by_patches", "grouped")


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (1, 3, 2)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_product_for_each_place_of_the_kernel_agrees(kernel: tuple[int, ...], dilation: int) -> None:
    sizes, padding = (7, 6, 8)[: len(kernel)], (1, 0, 2)[: len(kernel)]
    options = {"stride": (1,) * len(kernel), "padding": padding, "dilation": (dilation,) * len(kernel), "groups": 1}
    out = [s + 2 * p - dilation * (k - 1) for s, p, k in zip(sizes, padding, kernel, strict=True)]
    form = Correlation(real(N, 1, 4, *sizes), real(N, 1, 5, *out), (5, 4, *kernel), **options)
    assert_close(by_places(form), grouped(form))
    assert set(CHOSEN.values()) <= {"by_patches", "by_places", "grouped", "over the batch", "under vmap"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 30.0], ids=["plain", "cancels"])
def test_squares_of_products_are_as_precise_as_their_dtype(dtype: torch.dtype, mean: float) -> None:
    """Inputs that are nearly constant, and gradients of sum zero: the Gram form alone would lose all digits."""
    left = real(N, 16, 300)
    pair = Outer((left - left.mean(1, keepdim=True)).to(dtype), (real(N, 16, 310) + mean).to(dtype))
    exact = Outer(pair.left.double(), pair.right.double()).squares()
    gap = (pair.squares().double() - exact).abs() / exact
    assert pair.squares_by_gram().min() > 0
    assert gap.max() < 8 * torch.finfo(dtype).eps


STATISTICS = real(4).abs()
OPS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, (5,), ((4, 5), (4,))),
    "linear, no bias": (F.linear, (3, 5), ((4, 5),)),
    "linear, a vector as weight": (lambda x, w: F.linear(x, w)[..., None], (3, 5), ((5,),)),
    "matmul": (torch.matmul, (3, 5), ((5, 4),)),
    "matmul with @": (lambda x, w: x @ w, (5,), ((5, 4),)),
    "matmul by the other side": (lambda x, w: w @ x.mT, (3, 5), ((4, 5),)),
    "addmm": (lambda x, w, b: torch.addmm(b, x[:, 0], w), (1, 5), ((5, 4), (4,))),
    "addmm, scaled": (lambda x, w, b: torch.addmm(b, x[:, 0], w, alpha=2), (1, 5), ((5, 4), (4,))),
    "conv2d, several images a sample": (lambda x, w, b: F.conv2d(x[0], w, b), (3, 2, 5, 5), ((4, 2, 3, 3), (4,))),
    "conv2d, padding='same', even": (lambda x, w: F.conv2d(x, w, padding="same"), (2, 5, 5), ((4, 2, 2, 2),)),
    "conv1d, stride leaves a rest": (lambda x, w: F.conv1d(x, w, stride=3), (2, 9), ((4, 2, 2),)),
    "conv_transpose2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1, 2),
        (4, 5, 5),
        ((4, 3, 3, 3), (6,)),
    ),
    "layer_norm, two axes": (lambda x, w, b: F.layer_norm(x, (3, 5), w, b), (2, 3, 5), ((3, 5), (3, 5))),
    "layer_norm, bias alone": (lambda x, b: F.layer_norm(x, (5,), None, b), (3, 5), ((5,),)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (5,), w), (3, 5), ((5,),)),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), (4, 3, 3), ((4,), (4,))),
    "instance_norm": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (4, 3, 3), ((4,), (4,))),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(x, STATISTICS, STATISTICS + 1, w, b),
        (4, 3),
        ((4,), (4,)),
    ),
}


WITHOUT_A_RULE = {"linear, a vector as weight", "matmul by the other side", "addmm, scaled"}
UNDER_VMAP = {*WITHOUT_A_RULE, "conv2d, several images a sample"}  # that function takes one sample apart


def assert_right(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Hold the backend's gradients and norms against the loop's."""
    for quantity in ("grads", "norms"):
        ours, loop = (getattr(get_backend(name), quantity)(model, squares) for name in ("bookkeeping", "naive"))
        assert_close(ours(inputs, targets), loop(inputs, targets))


def itself(name: str, g: PerSample) -> PerSample:
    return g


def differentiated_directly(model: nn.Module, inputs: Tensor, targets: Tensor) -> set[str]:
    """Return the parameters that were used outside of rules under vmap."""
    passes, found = Passes(own_copy(model), squares), []
    backward = passes._backward
    passes._backward = lambda *args: found.append(backward(*args)) or found[-1]  # type: ignore[func-returns-value, method-assign]
    passes.under_vmap(with_rules=True).run(inputs, targets, itself)
    return set(found[-1][0])


def way_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> str:
    """Return how the passes are run."""
    passes = Passes(own_copy(model), squares)
    passes(inputs, targets, itself)
    ((way, *_),) = passes.ways.values()
    return way.name


def over_the_batch(model: nn.Module, inputs: Tensor, targets: Tensor) -> bool:
    """Return whether the passes are an ordinary step's."""
    return way_of(model, inputs, targets) == "over the batch"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", OPS)
def test_every_op_agrees_with_the_loop_and_has_its_rule(name: str) -> None:
    op, inputs, shapes = OPS[name]
    parameters = nn.ParameterList([nn.Parameter(real(*shape)) for shape in shapes])
    model = Functional(lambda s, x: op(x, *s.p).sin(), p=parameters)
    assert_right(model, real(N, *inputs), real(N))
    assert bool(differentiated_directly(model, real(N, *inputs), real(N))) == (name in WITHOUT_A_RULE)
    assert over_the_batch(model, real(N, *inputs), real(N)) == (name not in UNDER_VMAP)


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


def habit(forward: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    model = Functional(forward, a=linear(5, 5), b=linear(5, 5), m=nn.MultiheadAttention(5, 1, batch_first=True))
    model.kept = [model.a.weight]
    return model.to(DEVICE, torch.float64)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in forward mode
@pytest.mark.parametrize("name", HABITS)
def test_models_may_do_what_they_like(name: str) -> None:
    assert_right(habit(HABITS[name]), real(N, 5), real(N))


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
    "random": (lambda s, x: s.a(x).sin() + 0 * s.b(F.dropout(x)), False),
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


def test_attention_has_rules() -> None:
    assert not differentiated_directly(habit(HABITS["attention"]), real(N, 5), real(N))


@pytest.mark.parametrize("layer", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_have_rules(layer: type[nn.Module]) -> None:
    model = Functional(lambda s, x: s.r(x)[0], r=layer(5, 4, 2, bidirectional=True)).to(DEVICE, torch.float64)
    assert not differentiated_directly(model, real(N, 3, 5), real(N))


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


def by_its_values(s: nn.Module, x: Tensor) -> Tensor:
    """Go on for as long as a value says: of a batch, for as long as the first sample's says."""
    for _ in range(3 if float(x.flatten()[0].detach()) > 0 else 1):
        x = s.a(x).sin()
    return x


def by_any_value(s: nn.Module, x: Tensor) -> Tensor:
    """Go another way where any sample says so; of the test's batch, only the last one does."""
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
    "control flow by values of a late sample": (by_any_value, "one by one"),
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
    inputs[-1, 0] = 2 * LATE
    for quantity in QUANTITIES:
        ours, loop = (getattr(get_backend(b), quantity)(model, squares) for b in ("bookkeeping", "naive"))
        assert_close(ours(inputs, targets), loop(inputs, targets))
    assert way_of(model, inputs, targets) == way


def test_a_batch_that_fails_leaves_the_cheapest_way_as_it_was() -> None:
    model = habit(lambda s, x: s.a(x).sin())
    broken = False

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return squares(outputs, targets) / (None if broken else 1)  # type: ignore[operator]

    passes = Passes(own_copy(model), loss_fn)
    passes(real(6, 5), real(6), itself)
    broken = True
    with pytest.raises(TypeError):
        passes(real(6, 5), real(6), itself)
    broken = False
    passes(real(6, 5), real(6), itself)
    ((way, *_),) = passes.ways.values()
    assert way.name == "over the batch"


def test_an_input_that_is_changed_later_is_an_error_as_in_autograd() -> None:
    model = habit(lambda s, x: (h := x * 1, s.a(h), h.add_(1))[1])
    with pytest.raises(RuntimeError, match="inplace"):
        get_backend("bookkeeping").grads(model, squares)(real(N, 5), real(N))


def test_reused_buffers_are_the_same_memory_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(linear(5, 5), nn.Tanh(), linear(5, 5)).to(DEVICE, torch.float64)
    for reuse in (True, False):
        fn = get_backend("bookkeeping", reuse_buffers=reuse).grads(model, squares)
        first, second = (fn(real(N, 5) + i, real(N))["0.weight"] for i in (0, 1))
        assert (first.data_ptr() == second.data_ptr()) == reuse
        assert_close(second, get_backend("naive").grads(model, squares)(real(N, 5) + 1, real(N))["0.weight"])


def test_memory_is_given_out_again_once_nobody_holds_it() -> None:
    pool, like = Pool(), torch.zeros(0, dtype=torch.bfloat16)
    first = pool.empty((3, LARGE), like)
    place, part = first.data_ptr(), first[1]
    assert (first.shape, first.dtype) == ((3, LARGE), torch.bfloat16)
    del first
    assert pool.empty((3, LARGE), like).data_ptr() != place, "a part of it is held"
    del part
    assert pool.empty((3, LARGE), like).data_ptr() == place


def test_memory_that_is_kept_for_results_is_given_back_when_asked() -> None:
    pool, like = Pool(), torch.zeros(0)
    blocks = [weakref.ref(pool.empty((LARGE,), like)), weakref.ref(pool.same("w", (LARGE,), like))]
    assert blocks[1]() is not None
    backend_class("bookkeeping").release()
    assert [block() for block in blocks] == [None, None]
    assert not pool._blocks


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


def test_memory_outlives_its_pool() -> None:
    block = Pool().empty((LARGE,), torch.zeros(0))
    assert block.fill_(1).sum() == LARGE


def test_under_autocast_results_are_in_the_parameters_dtype() -> None:
    model = nn.Sequential(linear(64, 64), nn.LayerNorm(64), linear(64, 4)).to(DEVICE)
    inputs, targets = real(N, 64).float(), real(N).float()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours, loop = (get_backend(b).grads(model, squares)(inputs, targets) for b in ("bookkeeping", "naive"))
    assert {g.dtype for g in ours.values()} == {torch.float32}
    for name, g in loop.items():
        assert (ours[name] - g).norm() < 0.05 * g.norm(), name


@pytest.mark.parametrize("quantity", ["norms", "clipped_sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_batch_in_parts_has_the_same_result(
    quantity: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(linear(5, 5), nn.Tanh(), linear(5, 5)).to(DEVICE, dtype)
    inputs, targets = real(17, 5).to(dtype), real(17).to(dtype)
    found = []
    for parts in (1, 2):
        monkeypatch.setattr(InParts, "_seconds", lambda self, counts, *batch, parts=parts: {1: parts, 2: 1.5, 4: 2})
        found.append(getattr(get_backend("bookkeeping"), quantity)(model, squares)(inputs, targets))
        assert CHOSEN[f"{quantity} of Sequential of 17 samples"] == ("all at once" if parts == 1 else "in 2 parts")
    once, twice = ({"": t} if isinstance(t, Tensor) else t for t in found)
    for name, t in once.items():
        assert twice[name].dtype == t.dtype
        assert (twice[name] - t).norm() <= 4 * torch.finfo(dtype).eps * t.norm(), name


def test_parts_double_for_as_long_as_that_helps_and_each_sample_is_in_one() -> None:
    seen: list[int] = []

    def run(inputs: Batch, targets: Tensor) -> Tensor:
        seen.append(len(targets))
        return targets * 2

    parts = InParts(run, torch.cat, "doubling")
    inputs, targets = real(67, 5), real(67)
    parts.choose(inputs, targets)
    (count,) = parts.counts.values()
    assert count in (1, 2, 4, 8)
    seen.clear()
    parts.counts = dict.fromkeys(parts.counts, 8)
    assert_close(parts(inputs, targets), targets * 2)
    assert (len(seen), sum(seen), max(seen) - min(seen)) == (8, 67, 1)


def test_a_batch_that_is_too_large_for_memory_is_run_in_parts() -> None:
    def run(inputs: Batch, targets: Tensor) -> Tensor:
        if len(targets) > 20:
            raise torch.OutOfMemoryError
        return targets * 2

    parts = InParts(run, torch.cat, "doubling")
    parts.choose(real(67, 5), real(67))
    assert_close(parts(real(67, 5), real(67)), real(67) * 2)


def test_small_batches_and_other_forms_are_not_divided() -> None:
    parts = InParts(lambda inputs, targets: targets, torch.cat, "nothing")
    assert parts.knows(real(15, 5), real(15))
    assert not parts.knows(real(16, 5), real(16))
    parts.choose(real(16, 5), real(16))
    assert parts.knows(real(16, 5), real(16))
    assert not parts.knows(real(16, 6), real(16))


@pytest.mark.parametrize("quantity", ["norms", "clipped_sum"])
def test_random_ops_go_on_from_part_to_part_and_a_first_call_draws_as_later_ones_do(quantity: str) -> None:
    model = nn.Sequential(linear(5, 64), nn.Dropout(), linear(64, 5)).to(DEVICE, torch.float64)
    fn = getattr(get_backend("bookkeeping"), quantity)(model, squares)
    inputs, targets = real(1, 5).expand(32, 5).clone(), real(1).expand(32).clone()
    first, second = fn(inputs, targets), fn(inputs, targets)
    if quantity == "norms":
        assert_close(first, second)
        assert len(first.unique()) == 32, "samples have masks of their own"
    else:
        for name, t in first.items():
            assert_close(second[name], t)


def net(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a small model of ops of many kinds, inputs and targets; `kind` is what it begins with."""
    torch.manual_seed(0)
    if kind == "tokens":
        first, inputs = nn.Embedding(7, 6, padding_idx=0), torch.arange(N * 4, device=DEVICE).view(N, 4) % 7
        model = nn.Sequential(first, nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
    else:
        first, inputs = nn.Conv2d(2, 4, 3, padding=1), real(N, 2, 5, 5)
        model = nn.Sequential(first, nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(27, 3))
    return model.to(DEVICE, torch.float64), inputs, real(N, 3)


def squares_of_rows(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1)


@pytest.mark.parametrize(
    ("kind", "quantities"), [("tokens", ["norms", "variance"]), ("images", ["grads", "clipped_sum"])]
)
def test_compiled_is_the_same_and_sees_later_steps(kind: str, quantities: list[str]) -> None:
    model, inputs, targets = net(kind)
    ours = {q: getattr(get_backend("bookkeeping", compile=True), q)(model, squares_of_rows) for q in quantities}
    plain = {q: getattr(get_backend("naive"), q)(model, squares_of_rows) for q in quantities}
    found, expected = [], []
    for _ in range(2):
        found.append({quantity: fn(inputs, targets) for quantity, fn in ours.items()})
        expected.append({quantity: fn(inputs, targets) for quantity, fn in plain.items()})
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
    for quantity in quantities:
        for ours_then, loop_then in zip(found, expected, strict=True):  # the first results are still what they were
            assert_close(ours_then[quantity], loop_then[quantity])


def test_what_is_run_one_by_one_or_asks_for_values_is_not_compiled() -> None:
    for forward in (by_its_values, lambda s, x: s.a(x) if s.a.bias.sum() > -9 else s.b(x)):
        with pytest.raises(Unsupported, match="compile=True"):
            get_backend("bookkeeping", compile=True).norms(habit(forward), squares)(real(6, 5), real(6))
