"""What a few samples do not show: models that `bookkeeping` has got wrong, each held against the loop."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backends import get_backend
from backends.base import Unsupported, own_copy
from backends.batch import Batch, apply
from backends.ops.choice import CHOSEN
from tests.asserts import assert_close
from tests.cases import DEVICE, Functional, linear, real

Forward = Callable[..., Tensor]


pytestmark = pytest.mark.usefixtures("own_random_state")


def at(index: list[tuple[int, ...]], value: float, *shape: int) -> Tensor:
    """Return numbers of which some are as given."""
    t = real(*shape)
    for place in index:
        t[place] = value
    return t


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.flatten(1).sin().sum(1) - targets).square()


def model_of(forward: Forward, **parts: nn.Module | nn.Parameter) -> nn.Module:
    parts = {"a": linear(5, 5), "b": linear(5, 5), **parts}
    return Functional(forward, **parts).to(DEVICE, torch.float64)


def time_first(s: nn.Module, x: Tensor) -> Tensor:
    return s.b(torch.tanh(s.a(x.transpose(0, 1).flatten(0, 1))).view(x.shape[1], x.shape[0], -1).mean(0))


def sorted_by_length(s: nn.Module, x: Tensor, length: Tensor) -> Tensor:
    order = length.argsort(stable=True, descending=True)
    return s.b(torch.tanh(s.a(x[order]))[order.argsort()])


def number_found(count: Callable[[Tensor], Tensor], s: nn.Module, x: Tensor) -> Tensor:
    return s.a(x).sin() if len(count(x[:, 0] > 50)) == 0 else s.b(x)


def unpadded(s: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros_like(x).index_put((mask,), s.b(torch.tanh(s.a(x[mask]))))


def ragged(s: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
    rows = torch.arange(len(x), device=x.device).repeat_interleave(counts)
    place = torch.arange(len(rows), device=x.device) - (counts.cumsum(0) - counts)[rows]
    return torch.zeros_like(x).index_add(0, rows, torch.tanh(s.a(x[rows] * (1 + place)[:, None])))


def experts(s: nn.Module, x: Tensor) -> Tensor:
    """Route each sample to both experts, by rank, as Mixtral does."""
    chosen, found = torch.stack([x[:, 0] < 0, x[:, 0] >= 0], 1).long(), torch.zeros_like(x)
    for number, expert in enumerate((s.a, s.b)):
        rank, token = torch.where((chosen == number).T)
        found = found.index_add(0, token, expert(x[token]) * (1 + rank)[:, None])
    return found


def mask_token(s: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    h = x.clone()
    h[mask] = s.token
    return s.a(h).sin()


def seeded(s: nn.Module, x: Tensor) -> Tensor:
    generator = torch.Generator(device=x.device).manual_seed(0)
    return s.a(x @ torch.randn(5, 5, generator=generator, dtype=x.dtype, device=x.device)) * s.token


def checkpointed(s: nn.Module, x: Tensor) -> Tensor:
    """The recomputed layer keeps its input, which the watched one did not: it may be taken for the one GELU keeps."""
    return s.b(checkpoint(lambda z: F.gelu(s.a(z)), x, use_reentrant=False))  # type: ignore[no-any-return]


def first(column: list[float]) -> Tensor:
    """Return samples of which the first number is as given."""
    t = real(len(column), 5)
    t[:, 0] = torch.tensor(column)
    return t


ONE, TWO = [0, 1, 0], [1, 1, 0]


def mask(*rows: list[int]) -> Tensor:
    return torch.tensor(rows).bool()


# Of six samples, the third and the fifth are not looked at; of seven and eight, the second and the last but one.
CASES: dict[str, tuple[Forward, Batch]] = {
    "time first": (time_first, real(6, 3, 5)),
    "sorted by a number": (sorted_by_length, (real(7, 5), torch.tensor([5.0, 3, 5, 5, 5, 1, 5]))),
    "sorted": (sorted_by_length, (real(7, 5), torch.tensor([5, 3, 5, 5, 5, 1, 5]))),
    "how many are nonzero": (partial(number_found, torch.nonzero), at([(2, 0)], 100.0, 6, 5)),
    "how many are unique": (partial(number_found, lambda t: t.unique()[1:]), at([(2, 0)], 100.0, 6, 5)),
    "how many are in a mask": (partial(number_found, lambda t: t[t]), at([(2, 0)], 100.0, 6, 5)),
    "unpadded": (unpadded, (real(6, 3, 5), mask(TWO, TWO, ONE, TWO, [1, 1, 1], TWO))),
    "ragged": (ragged, (real(6, 5), torch.tensor([2, 2, 1, 2, 3, 2]))),
    "experts": (experts, first([1, -1, 1, 1, 1, 1, -1, 1])),
    "a token put in by a mask": (mask_token, (real(6, 3, 5), mask(ONE, ONE, [1, 1, 0], ONE, [0, 0, 0], ONE))),
    "a seed of its own": (seeded, real(6, 5)),
    "its function": (lambda s, x: y.sin() if (y := s.a(x) * s.token).grad_fn is not None else y * 0, real(6, 5)),
    "a leaf": (lambda s, x: y * 0 if (y := s.a(x) * s.token).is_leaf else y.sin(), real(6, 5)),
    "a checkpoint": (checkpointed, real(6, 5)),
    "a checkpoint, alone": (checkpointed, real(1, 5)),
}


@pytest.mark.parametrize("quantity", ["grads", "norms"])
@pytest.mark.parametrize("name", CASES)
def test_a_few_samples_do_not_mislead(name: str, quantity: str) -> None:
    forward, inputs = CASES[name]
    model, inputs = model_of(forward, token=nn.Parameter(real(1, 5))), apply(lambda t: t.to(DEVICE), inputs)
    targets = real(len(inputs if isinstance(inputs, Tensor) else inputs[0])).to(DEVICE)
    ours, loop = (getattr(get_backend(b), quantity)(model, squares) for b in ("bookkeeping", "naive"))
    for _ in range(2):
        assert_close(ours(inputs, targets), loop(inputs, targets))


def embedded(s: nn.Module, x: Tensor) -> Tensor:
    return s.b(torch.tanh(s.e(x.t().flatten())).view(x.shape[1], x.shape[0], -1).mean(0))


@pytest.mark.parametrize("what", ["zero head", "equal tokens"])
def test_what_the_first_batch_cannot_tell_is_asked_again(what: str) -> None:
    if what == "zero head":
        model, first, later = model_of(time_first), real(6, 3, 5), real(6, 3, 5) + 1
        nn.init.zeros_(model.b.weight)
    else:
        model, first, later = model_of(embedded, e=nn.Embedding(9, 5)), torch.zeros(6, 3).long(), None
        later = torch.arange(18).view(6, 3) % 9
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    assert_close(ours(first.to(DEVICE), real(6).to(DEVICE) * 0), loop(first.to(DEVICE), real(6).to(DEVICE) * 0))
    with torch.no_grad():
        model.b.weight.add_(real(5, 5).to(DEVICE))
    assert_close(ours(later.to(DEVICE), real(6).to(DEVICE)), loop(later.to(DEVICE), real(6).to(DEVICE)))


def test_samples_without_a_gradient_do_not_mislead() -> None:
    targets = torch.tensor([-100, 0, -100, 1, -100, 4, 2, -100], device=DEVICE)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, ignore_index=-100, reduction="none")

    model = model_of(time_first)
    ours, loop = (get_backend(b).grads(model, loss_fn) for b in ("bookkeeping", "naive"))
    assert_close(ours(real(8, 3, 5).to(DEVICE), targets), loop(real(8, 3, 5).to(DEVICE), targets))


@pytest.mark.parametrize("shape", [(), (1,), (1, 4), (3, 4)])
def test_a_bias_may_be_broadcast(shape: tuple[int, ...]) -> None:
    model = model_of(lambda s, x: F.linear(x, s.w, s.c), w=nn.Parameter(real(4, 5)), c=nn.Parameter(real(*shape)))
    for quantity in ("grads", "norms", "clipped_sum"):
        ours, loop = (getattr(get_backend(b), quantity)(model, squares) for b in ("bookkeeping", "naive"))
        inputs, targets = real(6, 3, 5).to(DEVICE), real(6).to(DEVICE)
        assert_close(ours(inputs, targets), loop(inputs, targets))


def test_complex_parameters_are_differentiated_by_autograd() -> None:
    model, inputs = nn.Linear(5, 4, dtype=torch.complex128).to(DEVICE), torch.complex(real(6, 5), real(5, 6).T)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.real.sum(1) - targets).square() + outputs.abs().square().sum(1)

    ours, loop = (get_backend(b).grads(model, loss_fn) for b in ("bookkeeping", "naive"))
    for name, g in loop(inputs.to(DEVICE), real(6).to(DEVICE)).items():
        assert (ours(inputs.to(DEVICE), real(6).to(DEVICE))[name] - g).norm() < 1e-12 * g.norm()


def test_padding_has_no_gradient_even_where_it_is_not_finite() -> None:
    model = model_of(lambda s, x: s.e(x).square().sum(-1).sqrt(), e=nn.Embedding(7, 4, padding_idx=0))
    tokens = torch.arange(18, device=DEVICE).view(6, 3) % 6 + 1
    tokens[4, 2] = 0
    for quantity in ("grads", "norms"):
        ours, loop = (getattr(get_backend(b), quantity)(model, squares) for b in ("bookkeeping", "naive"))
        assert_close(ours(tokens, real(6).to(DEVICE)), loop(tokens, real(6).to(DEVICE)))


def of_each_other(s: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Put the batch's mean where a sample has nothing: others change it, and it changes nobody."""
    return s.a(torch.where(mask, x, (x * mask).sum(0) / mask.sum(0).clamp(min=1))).sin()


def scattered(s: nn.Module, x: Tensor, tokens: Tensor) -> Tensor:
    """Put features where tokens say, as LLaVA does with those of an image."""
    return s.b(x.masked_scatter((tokens == 9)[..., None].expand_as(x), s.a(x[:, :2])).tanh())


def up_to_the_longest(s: nn.Module, x: Tensor, length: Tensor) -> Tensor:
    return (s.a(x).tanh() * (torch.arange(x.shape[1], device=x.device) < length.max())[:, None]).sum(1)


def split(s: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    left, right = torch.tensor_split(x, at[:1].cpu(), dim=1)  # of a batch, where the first sample says
    return s.a(left).tanh().sum(1) + s.b(right).tanh().sum(1)


def packed(s: nn.Module, x: Tensor, length: Tensor) -> Tensor:
    x.sub_(0.1)
    found = nn.utils.rnn.pack_padded_sequence(x, length.cpu(), True, False)
    found = found._replace(data=s.a(found.data).tanh())
    return s.b(nn.utils.rnn.pad_packed_sequence(found, True, total_length=x.shape[1])[0].sum(1))


FULL, RAGGED = torch.full((6,), 3), torch.tensor([3, 1, 2, 3, 1, 2])
TWO_EACH, NOT_EACH = torch.tensor([[9, 9, 1], [1, 9, 9]] * 3), torch.tensor([[9, 9, 1], [1, 9, 1]] * 3)
LATER: dict[str, tuple[Forward, Batch, Batch]] = {
    "sorted": (sorted_by_length, (real(6, 5), torch.ones(6).int()), (real(6, 5), RAGGED.int())),
    "scattered": (scattered, (real(6, 3, 5), TWO_EACH), (real(6, 3, 5), NOT_EACH)),
    "up to the longest": (up_to_the_longest, (real(6, 4, 5), FULL), (real(6, 4, 5), RAGGED)),
    "split": (split, (real(6, 4, 5), torch.ones(6).long()), (real(6, 4, 5), RAGGED)),
    "packed": (packed, (real(6, 4, 5), torch.full((6,), 2)), (real(6, 4, 5), RAGGED)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", LATER)
def test_what_the_first_batch_does_not_show_is_right_in_later_ones(name: str) -> None:
    forward, *batches = LATER[name]
    model = model_of(forward)
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    for inputs in (*batches, batches[0]):
        ours_in, loop_in = (apply(lambda t: t.to(DEVICE, copy=True), inputs) for _ in range(2))
        assert_close(ours(ours_in, real(6).to(DEVICE)), loop(loop_in, real(6).to(DEVICE)))


def test_a_sample_that_others_change_is_noticed() -> None:
    mask = torch.ones(7, 5, device=DEVICE).bool()
    mask[3, ::2] = False
    model, inputs = model_of(of_each_other), (real(7, 5).to(DEVICE), mask)
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    assert_close(ours(inputs, real(7)), loop(inputs, real(7)))


LONG, SHORT = torch.tensor([[1, 2, 3, 1, 2], [2, 1, 2, 1, 1]] * 4), torch.tensor([1, 0, 0, 0, 0])
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[Tensor]]] = {
    "by how many there are of its class": (
        lambda o, t: F.cross_entropy(o, t, reduction="none") / (t[:, None] == t).sum(1),
        [torch.tensor([0, 0, 1, 1, 2, 3, 3, 4])],  # of those that are looked at, no two have the same
    ),
    "by the longest target": (
        lambda o, t: (o.sin() * (t > 0)).sum(1) / (t > 0).sum(1).max(),
        [LONG, torch.cat([LONG[:5], SHORT[None], LONG[6:]])],
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_asks_for_other_targets_is_noticed(name: str) -> None:
    loss, batches = LOSSES[name]
    model, inputs = model_of(lambda s, x: s.a(x)), real(8, 5).to(DEVICE)
    ours, loop = (get_backend(b).norms(model, loss) for b in ("bookkeeping", "naive"))
    for targets in batches:
        assert_close(ours(inputs, targets.to(DEVICE)), loop(inputs, targets.to(DEVICE)))


def test_targets_of_another_form_are_looked_at_anew() -> None:
    model, inputs = model_of(lambda s, x: s.c(x), c=linear(5, 1)), real(6, 5).to(DEVICE)
    ours, loop = (get_backend(b).norms(model, lambda o, t: (o - t).square().mean(1)) for b in ("bookkeeping", "naive"))
    for targets in (real(6, 1).to(DEVICE), real(6).to(DEVICE)):  # these make a matrix with the outputs
        assert_close(ours(inputs, targets), loop(inputs, targets))


def test_a_head_with_one_output_is_run_over_the_batch() -> None:
    model, inputs = model_of(lambda s, x: s.c(x).sin(), c=linear(5, 1)), real(6, 5).to(DEVICE)
    assert model.c.bias is not None
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    assert_close(ours(inputs, real(6).to(DEVICE)), loop(inputs, real(6).to(DEVICE)))
    assert CHOSEN["passes of Functional"] == "over the batch"


def test_a_small_penalty_on_a_parameter_that_is_there_n_times_counts_once() -> None:
    """In float32 a hundredth is not looked at, and it would grow with N."""
    model = model_of(lambda s, x: s.c(x.sin())[:, 0] + 2e-4 * s.c.weight.square().sum(), c=linear(5, 1)).float()
    inputs, targets = real(200, 5).float().to(DEVICE), real(200).float().to(DEVICE)
    ours, loop = (get_backend(b).norms(model, lambda o, t: (o - t).square()) for b in ("bookkeeping", "naive"))
    torch.testing.assert_close(ours(inputs, targets), loop(inputs, targets), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bookkeeping", "naive"])
def test_inputs_get_no_gradient(name: str) -> None:
    inputs = real(6, 5).to(DEVICE).requires_grad_()
    get_backend(name).grads(model_of(lambda s, x: s.a(x).sin()), squares)(inputs, real(6).to(DEVICE))
    assert inputs.grad is None


@pytest.mark.parametrize("n", [6, 16])
def test_inputs_that_the_model_changes_are_changed_once(n: int) -> None:
    model = nn.Sequential(nn.SiLU(inplace=True), linear(5, 5)).to(DEVICE, torch.float64)
    for quantity in ("norms", "clipped_sum"):
        ours, loop = (getattr(get_backend(b), quantity)(model, squares) for b in ("bookkeeping", "naive"))
        inputs = real(n, 5).to(DEVICE)
        assert_close(ours(inputs, real(n).to(DEVICE)), loop(real(n, 5).to(DEVICE), real(n).to(DEVICE)))
        assert_close(inputs, F.silu(real(n, 5).to(DEVICE)))


@pytest.mark.parametrize("last", [1, 5])
def test_a_gradient_that_is_not_finite_leaves_the_way_as_it_was(last: int) -> None:
    model, inputs = model_of(lambda s, x: s.a(x).sin()), at([(last, 0)], float("nan"), 6, 5).to(DEVICE)
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    found, truth = ours(inputs, real(6).to(DEVICE)), loop(inputs, real(6).to(DEVICE))
    for name, g in truth.items():
        torch.testing.assert_close(found[name], g, equal_nan=True)
    assert CHOSEN["passes of Functional"] == "over the batch"


def test_integers_may_index() -> None:
    model = model_of(lambda s, x: s.a(x)[:, torch.tensor([0, 2], device=x.device)].sin())
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    assert_close(ours(real(6, 5).to(DEVICE), real(6).to(DEVICE)), loop(real(6, 5).to(DEVICE), real(6).to(DEVICE)))
    assert CHOSEN["passes of Functional"] == "over the batch"


def test_results_do_not_share_memory() -> None:
    model = model_of(lambda s, x: x + s.p + s.q, p=nn.Parameter(real(5)), q=nn.Parameter(real(5)))
    for n in (6, 1):
        found = get_backend("bookkeeping").grads(model, squares)(real(n, 5).to(DEVICE), real(n).to(DEVICE))
        found["p"].zero_()
        assert found["q"].any()


def test_what_a_model_keeps_for_itself_outlives_vmap() -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        if getattr(s, "cache", None) is None or len(s.cache) != len(x):
            s.cache = torch.ones_like(x)
        return s.a(x) * s.k + s.cache

    model = model_of(forward, k=nn.Parameter(real(5)))
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    for n in (5, 3, 1):
        inputs, targets = real(n, 5).to(DEVICE), real(n).to(DEVICE)
        assert_close(ours(inputs, targets), loop(inputs, targets))


@pytest.mark.parametrize("shape", [(5,), (1, 5)])
def test_a_module_may_have_two_names(shape: tuple[int, ...]) -> None:
    """`functional_call` does not give such a module its own parameters back."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(real(*shape))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    scale = Scale()
    model = model_of(lambda s, x: s.q(s.a(s.p(x)).tanh()), p=scale, q=scale)
    for quantity in ("grads", "norms"):
        ours, loop = (getattr(get_backend(b), quantity)(model, squares) for b in ("bookkeeping", "naive"))
        for n in (6, 1, 4):
            inputs, targets = real(n, 5).to(DEVICE), real(n).to(DEVICE)
            assert_close(ours(inputs, targets), loop(inputs, targets))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_module_has_no_copy() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.Tanh())), nn.Linear(5, 2))
    with pytest.raises(Unsupported, match=r"`0` .* is scripted"):
        own_copy(model)


def test_an_index_or_a_probability_stays_one() -> None:
    """On CUDA an index that is out of bounds ends the process, though the look would go on without it."""
    categories, shares = set[float](), set[float]()

    def forward(s: nn.Module, x: Tensor, share: Tensor) -> Tensor:
        with suppress(RuntimeError):  # vmap has no values
            categories.update(x[:, 0].tolist())
            shares.update(share.flatten().tolist())
        return s.b(torch.tanh(s.a(x[:, 1:]) + s.e(x[:, 0].long()) * share))

    category = torch.tensor([3.0, 0, 6, 3, 3, 1, 2], device=DEVICE)[:, None]
    inputs = torch.cat([category, real(7, 5)], 1), real(7, 5).sigmoid() / 2
    model = model_of(forward, e=nn.Embedding(7, 5))
    ours, loop = (get_backend(b).norms(model, squares) for b in ("bookkeeping", "naive"))
    assert_close(ours(inputs, real(7)), loop(inputs, real(7)))
    assert categories == {0.0, 1.0, 2.0, 3.0, 6.0}
    assert min(shares) > 0
    assert max(shares) == inputs[1].max()
