"""The bookkeeping backend: every rule against autograd, and what its options do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from backends import get_backend, precision
from backends.base import QUANTITIES
from backends.ops.correlation import Correlation
from tests.asserts import assert_close
from tests.cases import DEVICE, Functional, N, cases, linear, real, squares
from tests.habits import assert_right, differentiated_directly, over_the_batch

pytestmark = pytest.mark.usefixtures("own_random_state")


STATISTICS = real(4).abs()


OPS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, (5,), ((4, 5), (4,))),
    "linear, no bias": (F.linear, (3, 5), ((4, 5),)),
    "linear, a vector as weight": (lambda x, w: F.linear(x, w)[..., None], (3, 5), ((5,),)),
    "matmul": (torch.matmul, (3, 5), ((5, 4),)),
    "matmul with @": (lambda x, w: x @ w, (5,), ((5, 4),)),
    "matmul by the other side": (lambda x, w: w @ x.mT, (3, 5), ((4, 5),)),
    "mul": (lambda x, w: x * w, (3, 5), ((5,),)),
    "mul, the parameter first": (lambda x, w: w * x, (3, 5), ((5,),)),
    "mul, channels": (lambda x, w: torch.mul(x, w), (4, 3, 3), ((4, 1, 1),)),
    "mul, a number": (lambda x, w: w * x, (3, 5), ((),)),
    "mul, [1, ...]": (lambda x, w: w * x, (3, 5), ((1, 5),)),
    "mul, other samples behind": (lambda x, w: (x.movedim(0, -1) * w).movedim(-1, 0), (3, 5), ((5, 1),)),
    "mul, of itself": (lambda x, w: x * (w * w), (3, 5), ((5,),)),
    "mul, by a number": (lambda x, w: x * (2 * w), (3, 5), ((5,),)),
    "mul, of more axes": (lambda x, w: x[..., None, :] * w, (5,), ((3, 4, 5),)),
    "prelu, one number": (F.prelu, (3, 5), ((1,),)),
    "prelu, channels": (F.prelu, (3, 5, 2), ((3,),)),
    "prelu, features": (F.prelu, (5,), ((5,),)),
    "bilinear": (lambda x, w, b: F.bilinear(x[:, :2], x[:, 2:], w, b), (5,), ((4, 2, 3), (4,))),
    "bilinear, of several vectors": (lambda x, w: F.bilinear(x, x.cos(), w), (3, 2, 5), ((4, 5, 5),)),
    "add": (lambda x, w: x.sin() + w, (3, 5), ((5,),)),
    "add, the parameter first": (lambda x, w: w + x.sin(), (3, 5), ((3, 5),)),
    "add, scaled": (lambda x, w: torch.add(x.sin(), w, alpha=2), (3, 5), ((5,),)),
    "rows by index": (lambda x, w: w[(4 * x).long() % 7 - 3], (3,), ((7, 5),)),
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


WITHOUT_A_RULE = {
    "linear, a vector as weight",
    "matmul by the other side",
    "addmm, scaled",
    "mul, of itself",
    "mul, by a number",
    "mul, of more axes",
    "add, scaled",
}


UNDER_VMAP = {
    "mul, of more axes",  # the first one where samples are
    "conv2d, several images a sample",  # that function takes one sample apart
    "mul, other samples behind",  # samples are on an axis that the parameter has too
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", OPS)
def test_every_op_agrees_with_the_loop_and_has_its_rule(name: str) -> None:
    op, inputs, shapes = OPS[name]
    parameters = nn.ParameterList([nn.Parameter(real(*shape)) for shape in shapes])
    model = Functional(lambda s, x: op(x, *s.p).sin(), p=parameters)
    assert_right(model, real(N, *inputs), real(N))
    assert bool(differentiated_directly(model, real(N, *inputs), real(N))) == (name in WITHOUT_A_RULE)
    assert over_the_batch(model, real(N, *inputs), real(N)) == (name not in UNDER_VMAP)


def test_an_infinite_gradient_has_no_part_in_prelus_where_it_is_not_used() -> None:
    model = nn.PReLU(2).to(DEVICE, torch.float64)
    x = torch.tensor([[1.0, -2.0], [-1.0, 2.0], [3.0, 4.0]], dtype=torch.float64, device=DEVICE)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * torch.tensor([torch.inf, 1.0], dtype=torch.float64, device=DEVICE)).sum(1) * targets

    ours, loop = (get_backend(b).grads(model, loss)(x, real(N).abs()) for b in ("bookkeeping", "naive"))
    torch.testing.assert_close(ours, loop, equal_nan=True)
    assert ours["weight"][0].isfinite().all()


def test_reused_buffers_are_the_same_memory_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(linear(5, 5), nn.Tanh(), linear(5, 5)).to(DEVICE, torch.float64)
    for reuse in (True, False):
        fn = get_backend("bookkeeping", reuse_buffers=reuse).grads(model, squares)
        first, second = (fn(real(N, 5) + i, real(N))["0.weight"] for i in (0, 1))
        assert (first.data_ptr() == second.data_ptr()) == reuse
        assert_close(second, get_backend("naive").grads(model, squares)(real(N, 5) + 1, real(N))["0.weight"])


def test_chunks_do_not_share_reused_buffers() -> None:
    model = linear(60, 50).to(DEVICE, torch.float64)
    ours = get_backend("bookkeeping", reuse_buffers=True, chunk_size=2).grads(model, squares)
    assert_close(ours(real(6, 60), real(6)), get_backend("naive").grads(model, squares)(real(6, 60), real(6)))


def test_under_autocast_results_are_in_the_parameters_dtype() -> None:
    model = nn.Sequential(linear(64, 64), nn.LayerNorm(64), linear(64, 4)).to(DEVICE)
    inputs, targets = real(N, 3, 64).float(), real(N).float()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        ours, loop = (get_backend(b).grads(model, squares)(inputs, targets) for b in ("bookkeeping", "naive"))
    assert {g.dtype for g in ours.values()} == {torch.float32}
    assert get_backend("bookkeeping").choices()["passes of Sequential"] == "over the batch"
    for name, g in loop.items():
        assert (ours[name] - g).norm() < 0.05 * g.norm(), name


@pytest.mark.parametrize("quantity", ["norms", "clipped_sum"])
def test_under_autocast_wider_products_are_not_cast_back(quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pixels and many channels: norms by the Gram form, in a wider dtype, are among the ways."""
    seen: list[bool] = []
    by_gram = Correlation.squares_by_gram

    def watched(self: Correlation) -> Tensor:
        seen.append(torch.is_autocast_enabled(DEVICE.type))
        return by_gram(self)

    monkeypatch.setattr(Correlation, "squares_by_gram", watched)
    monkeypatch.setattr("backends.ops.choice._RANKED", {})
    model = nn.Conv2d(16, 64, 3).to(DEVICE, torch.float32)
    inputs, targets = torch.randn(8, 16, 5, 5, device=DEVICE, dtype=torch.float32), torch.zeros(8, device=DEVICE)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.float().square().sum((1, 2, 3))

    for runs in (model, Functional(lambda s, x: s.m(x) if x.sum().item() else None, m=model)):  # the second: one by one
        seen.clear()
        getattr(get_backend("bookkeeping", autocast="bfloat16"), quantity)(runs, loss_fn)(inputs, targets)
        assert seen
        assert not any(seen)


@pytest.mark.parametrize("scale", [2.0**14, 1e-3], ids=["scaled up", "scaled down"])
@pytest.mark.parametrize("layers", [[64, 256, 64], [8, 8, 8]], ids=["large", "small"])
@pytest.mark.parametrize("quantity", ["clipped_sum", "variance", "gram"])
def test_under_float16_autocast_results_may_be_beyond_float16(quantity: str, layers: list[int], scale: float) -> None:
    """As squares of gradients of a scaled loss are, and the factors that clip them."""
    a, b, c = layers
    model = nn.Sequential(linear(a, b), nn.Tanh(), linear(b, c)).to(DEVICE, torch.float32)
    inputs, targets = real(8, 3, a).float(), torch.arange(8, device=DEVICE) % c
    options = {"max_norm": 1e-4} if quantity == "clipped_sum" else {}
    spread = 1e-5 if scale > 1 else 1.0

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs[:, 0].to(inputs.dtype), targets, reduction="none")
        return scale * losses * torch.where(targets == 0, spread, 1.0)

    found = []
    for name, autocast in (("bookkeeping", "float16"), ("naive", None)):
        fn = getattr(get_backend(name, autocast=autocast), quantity)(model, loss_fn, **options)
        result = fn(inputs, targets)
        found.append({"": result} if isinstance(result, Tensor) else result)
    for name, exact in found[1].items():
        assert found[0][name].dtype == torch.float32
        assert (found[0][name] - exact).norm() < 0.05 * exact.norm(), name


@precision.without_tf32()
def test_uses_of_a_weight_in_two_dtypes_are_added_in_the_wider() -> None:
    def twice(s: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, enabled=False):
            exact = s.c(x.float())
        return s.c(x).float() + 100 * exact

    model = Functional(twice, c=nn.Conv2d(2, 3, 3)).to(DEVICE, torch.float32)
    inputs, targets = torch.randn(4, 2, 5, 5, device=DEVICE, dtype=torch.float32), real(4).float()
    for quantity in ("grads", "clipped_sum"):
        ours, loop = (
            getattr(get_backend(b, autocast="bfloat16"), quantity)(model, squares)(inputs, targets)
            for b in ("bookkeeping", "naive")
        )
        assert (ours["c.weight"] - loop["c.weight"]).norm() <= 1e-4 * loop["c.weight"].norm()


class Reads(TorchDispatchMode):
    """Counts values that are read: for each, a GPU has to be through with all that was asked of it."""

    OPS = ("_local_scalar_dense", "equal", "nonzero", "masked_select")
    many = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.many += func.overloadpacket.__name__ in self.OPS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", ["tutorial", "position embeddings", "MultiheadAttention", "GroupNorm"])
def test_later_calls_read_no_value(name: str, quantity: str) -> None:
    case = next(c for c in cases() if c.name == name)
    fn = getattr(get_backend("bookkeeping"), quantity)(case.model, case.loss_fn)
    for _ in range(2):
        fn(case.inputs, case.targets)
    with Reads() as reads:
        fn(case.inputs, case.targets)
    assert not reads.many
