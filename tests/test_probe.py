"""The probe that sees which sample a row belongs to, and the last check of a library's result."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from backends.base import Unsupported, unguarded
from backends.module_calls import collect, watcher
from backends.probe import Hooked, some, uses
from backends.verify import verify_gram
from testbed.conformance.case import Net

N, D = 5, 4
Order = Callable[[Tensor], Tensor]

MOVED: dict[str, Order] = {
    "reversed": lambda x: torch.arange(len(x)).flip(0),
    "rolled by one": lambda x: torch.arange(len(x)).roll(1),
    "rolled by two": lambda x: torch.arange(len(x)).roll(2),
    "rolled by three": lambda x: torch.arange(len(x)).roll(3),
    "rolled by four": lambda x: torch.arange(len(x)).roll(4),
    "halves swapped": lambda x: torch.arange(len(x)).roll(len(x) // 2),
    "the first two swapped": lambda x: torch.tensor([1, 0, *range(2, len(x))] if len(x) > 1 else [0]),
    "the last two swapped": lambda x: torch.tensor([*range(len(x) - 2), -1, -2] if len(x) > 1 else [0]) % len(x),
    "even ones first": lambda x: torch.cat([torch.arange(0, len(x), 2), torch.arange(1, len(x), 2)]),
    "sorted up": lambda x: x[:, 0].argsort(),
    "sorted down": lambda x: x[:, 0].argsort(descending=True),
    "drawn at random": lambda x: torch.randperm(len(x)),
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def model(order: Order) -> nn.Module:
    """Return a model whose layer sees the samples in an order, and whose outputs are in the batch's."""
    return Net(lambda m, x: m.a(x[(o := order(x))]).sin()[o.argsort()], a=nn.Linear(D, 3)).double()


def watching(net: nn.Module) -> Callable[[Tensor], None]:
    """Return the check that refuses an input."""
    look = watcher("X", net, lambda m: [Hooked(part) for part in m.modules() if isinstance(part, nn.Linear)])

    def check(inputs: Tensor) -> None:
        with look(inputs):
            pass

    return check


def samples(n: int = N) -> Tensor:
    """Return samples, neither in rising nor in falling order."""
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", MOVED)
def test_reordered_samples_are_seen(name: str) -> None:
    with pytest.raises(Unsupported, match=r"`a` \(Linear\): row . of its output belongs to sample .; X takes row i"):
        watching(model(MOVED[name]))(samples())


@pytest.mark.parametrize("inputs", [torch.ones(N, D).double(), torch.zeros(N, D).double(), samples().sort(0).values])
@pytest.mark.parametrize("name", ["sorted up", "sorted down"])
def test_sorting_is_seen_where_samples_are_equal_or_in_order(name: str, inputs: Tensor) -> None:
    with pytest.raises(Unsupported, match="takes row i to be sample i"):
        watching(model(MOVED[name]))(inputs)


def test_samples_in_their_place_are_accepted_whatever_is_done_to_them() -> None:
    watching(model(lambda x: torch.arange(len(x))))(samples())
    watching(Net(lambda m, x: m.a(x.clamp(min=0)).softmax(1) * x.sum(1, keepdim=True), a=nn.Linear(D, 3)).double())(
        samples()
    )
    watching(Net(lambda m, x: m.a(x).detach() + m.b(x), a=nn.Linear(D, 3), b=nn.Linear(D, 3)).double())(samples())


def test_one_sample_has_no_order_and_more_are_looked_at_again() -> None:
    check = watching(model(MOVED["reversed"]))
    check(samples(1))
    with pytest.raises(Unsupported):
        check(samples())


def test_a_constant_is_seen_by_where_its_result_goes() -> None:
    one_for_all = Net(lambda m, x: x @ m.a(torch.eye(D).double()), a=nn.Linear(D, 3)).double()
    with pytest.raises(Unsupported, match="batch axes of"):
        watching(one_for_all)(samples(D))
    one_for_each = Net(lambda m, x: x.sum(1, keepdim=True) * m.a(torch.ones_like(x)), a=nn.Linear(D, 3)).double()
    watching(one_for_each)(samples(D))


def test_a_model_that_cannot_take_its_samples_backwards_is_looked_at_in_order() -> None:
    def ordered(x: Tensor) -> Tensor:
        if (x[:, 0].diff() > 0).any():
            raise ValueError("not in order")
        return torch.arange(len(x))

    inputs = samples()
    watching(model(ordered))(inputs[inputs[:, 0].argsort(descending=True)])


def test_a_model_of_one_batch_size_is_refused() -> None:
    def only(x: Tensor) -> Tensor:
        if len(x) not in (1, N):
            raise ValueError("I want five")
        return torch.arange(len(x))

    with pytest.raises(Unsupported, match="X cannot be watched: `model` on a few samples: I want five"):
        watching(model(only))(samples())


def test_looking_leaves_the_model_and_the_random_state() -> None:
    net = model(MOVED["drawn at random"])
    net.register_buffer("count", torch.zeros(()))
    before = torch.get_rng_state()
    with pytest.raises(Unsupported):
        watching(net)(samples())
    assert torch.equal(torch.get_rng_state(), before)
    assert net.a.weight.grad is None
    assert not net.a._forward_hooks


def test_unguarded_nothing_is_looked_at() -> None:
    with unguarded():
        watching(model(MOVED["reversed"]))(samples())


def test_few_samples_are_taken_in_order_and_backwards() -> None:
    inputs = samples()
    one, few, backwards = some(inputs)
    assert torch.equal(one, inputs[:1])
    spread = [i * (len(inputs) - 1) // 3 for i in range(4)]
    assert torch.equal(few, inputs[spread])
    assert torch.equal(backwards, inputs[spread[:0:-1]])
    assert [len(t) for t in some(inputs[:2])] == [1, 4, 3]


def test_a_use_says_what_was_seen() -> None:
    net = Net(lambda m, x: m.a(x) @ m.w, a=nn.Linear(D, 3), w=nn.Parameter(torch.ones(3, 2))).double()
    call, product = uses(net, {"a": Hooked(net.a)}, samples(3), sample=1)
    assert (call.by, call.parameters, call.counts, call.strays) == ("`a` (Linear)", ("a.weight", "a.bias"), (3, 3), [])
    assert (product.by, product.parameters) == ("torch.Tensor.matmul with parameter `w`", ("w",))


GRADS = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("found", "total", "message"),
    [
        (GRADS[:1], GRADS.sum(0), "has shape \\[1, 2\\], not \\[2, 2\\]"),
        (GRADS, 2 * GRADS.sum(0), "do not sum to the batch gradient"),
        (GRADS, None, "do not sum to the batch gradient"),
        (None, GRADS.sum(0), "computes no per-sample gradient"),
    ],
)
def test_a_result_that_cannot_be_right_is_refused(found: Tensor | None, total: Tensor | None, message: str) -> None:
    p = nn.Parameter(torch.zeros(2))
    p.kept, p.grad = found, total
    with pytest.raises(Unsupported, match=f"parameter `p`: X.*{message}"):
        collect("X", {"p": p}, "kept", 2, verify=True)


def test_a_result_is_taken_off_the_parameters() -> None:
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    used.kept, used.grad = GRADS, GRADS.sum(0)
    found = collect("X", {"used": used, "unused": unused}, "kept", 2, verify=True)
    assert torch.equal(found["used"], GRADS)
    assert torch.equal(found["unused"], torch.zeros(2, 3))
    assert used.grad is None
    assert not hasattr(used, "kept")


def test_a_gram_matrix_that_misses_a_part_of_the_gradients_is_refused() -> None:
    g = samples()
    verify_gram("X", g @ g.T, {"p": g.sum(0)})
    with pytest.raises(Unsupported, match="X's Gram matrix does not sum to"):
        verify_gram("X", g[:, 1:] @ g[:, 1:].T, {"p": g.sum(0)})
    with unguarded():
        verify_gram("X", g[:, 1:] @ g[:, 1:].T, {"p": g.sum(0)})
