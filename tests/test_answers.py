"""Models that ask whether something holds for all samples, or for any: each must go the way that it goes alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends import get_backend
from backends.base import QUANTITIES, Unsupported, own_copy
from backends.ops.look import itself
from backends.ops.passes import Passes
from backends.ops.ways import Ways
from testbed.problems import make_problem
from tests.asserts import CLOSE, assert_close
from tests.cases import DEVICE, Functional, linear, real, squares
from tests.habits import assert_right

pytestmark = pytest.mark.usefixtures("own_random_state")

Batch = tuple[tuple[Tensor, Tensor], Tensor]


def mean(h: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the positions that count."""
    return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def left_out(ask: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """Return a model that leaves out a mask where it may: what a batch does is right for each of its samples."""

    def forward(s: Any, x: Tensor, mask: Tensor) -> Tensor:
        h = s.a(x).tanh()
        return s.b(h.mean(1) if ask(mask) else mean(h, mask))  # type: ignore[no-any-return]

    return forward


def any_is_large(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    h = s.a(x).tanh()
    return s.b(mean(h * 1.0001 if (x.abs() > 5).any() else h, mask))  # type: ignore[no-any-return]


def all_are_whole(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    h = mean(s.a(x).tanh(), mask)
    return s.b(h * 1.0001 if torch.all(mask == 1) else h)  # type: ignore[no-any-return]


def mixed_where_masked(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    h = mean(s.a(x).tanh(), mask)
    return s.b(h if mask.all() else h - 0.001 * h.mean(0))  # type: ignore[no-any-return]


def asks_again(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    h = s.a(x).tanh()
    if mask.all():
        return s.b(h.mean(1))  # type: ignore[no-any-return]
    return s.b(mean(h + x.sum(2, keepdim=True) if (x > 8).any().item() else h, mask))  # type: ignore[no-any-return]


def asks_on_its_own_way(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    """What a sample alone is asked next, a batch is not."""
    h = mean(s.a(x).tanh(), mask)
    if (x > 8).any():
        return s.b(h)  # type: ignore[no-any-return]
    return s.b(2 * h if (mask == 1).all() else h)  # type: ignore[no-any-return]


def clamps(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    """It is some samples that are changed of those that alone would not be."""
    return s.b(mean(s.a(x.clamp(max=1) if (x > 8).any() else x).tanh(), mask))  # type: ignore[no-any-return]


def changes_its_flag(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    whole = (mask == 1).all()
    whole &= (x < 8).all()
    return s.b((2 if whole else 1) * mean(s.a(x).tanh(), mask))  # type: ignore[no-any-return]


def changes_what_it_has_counted(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    counts = mask.bool()
    count = counts.sum()
    counts[:, 0] = False
    return s.b((2 if count == counts.numel() else 1) * mean(s.a(x).tanh(), mask))  # type: ignore[no-any-return]


def counts_over_two(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    count = (mask == 5).sum()
    count += (x > 8).sum()
    return s.b((2 if count == 0 else 1) * mean(s.a(x).tanh(), mask))  # type: ignore[no-any-return]


def moves_its_axes(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    asked = (x < 8)[:, :, None, :][:, [0, 1], :, [0, 1]]  # [2, N, 1]
    return s.b((2 if asked.all() else 1) * mean(s.a(x).tanh(), mask))  # type: ignore[no-any-return]


def changes_data(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    mine = (x > 8).clone()
    mine.data.copy_(mine | mine.flip(1))
    return s.b((2 if mine[:, 4].any() else 1) * mean(s.a(x).tanh(), mask))  # type: ignore[no-any-return]


def outliers(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Alone, a sample has another mean."""
    h = mean(s.a(x).tanh(), mask)
    return s.b(2 * h if (x.abs() > 3 * x.abs().mean()).any() else h)  # type: ignore[no-any-return]


def changes_its_inputs(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    if (x > 8).any():
        x.copy_(torch.where(x > 8, x / 2, x))
    h = mean(s.a(x).tanh(), mask)
    return s.b(2 * h if mask.all() else h)  # type: ignore[no-any-return]


LEFT_OUT: dict[str, Callable[[Tensor], Any]] = {
    "all": lambda mask: mask.all(),
    "torch.all": lambda mask: torch.all(mask == 1),
    "of another shape": lambda mask: mask.view(len(mask), -1)[:, None].bool().all(),
    "with more before it": lambda mask: torch.cat([torch.ones(len(mask), 2, device=mask.device), mask], dim=1).all(),
    "not any": lambda mask: not (mask == 0).any(),
    "item": lambda mask: mask.bool().all().item(),
    "in": lambda mask: 0 not in mask,
    "as many as there are": lambda mask: mask.bool().sum() == mask.numel(),
    "none of the others": lambda mask: (mask == 0).sum() == 0,
}

OTHERS: dict[str, Callable[..., Tensor]] = {
    "any is large": any_is_large,
    "all are whole": all_are_whole,
    "mixed where masked": mixed_where_masked,
    "asks again": asks_again,
    "asks on its own way": asks_on_its_own_way,
    "clamps": clamps,
    "changes its flag": changes_its_flag,
    "changes what it has counted": changes_what_it_has_counted,
    "outliers": outliers,
    "counts over two": counts_over_two,
    "moves its axes": moves_its_axes,
    "changes data": changes_data,
    "changes its inputs": changes_its_inputs,
    "of it twice": left_out(lambda mask: torch.cat([mask, mask]).all()),
    "of a square": left_out(lambda mask: torch.cat([torch.ones(5, 5, device=mask.device), mask], -2).all()),
    "transposed and back": left_out(lambda mask: mask.T.reshape(mask.shape).all()),
    "of an activation": lambda s, x, mask: s.b((2 if ((h := mean(s.a(x), mask)) > 1).any() else 1) * h),
    "as a number": lambda s, x, mask: s.b(mean(s.a(x), mask) * (1 + (x > 8).any())),
    "of all, transposed": left_out(lambda mask: mask.T.all()),
    "how many": left_out(lambda mask: int(mask.sum()) == mask.numel()),
    "of the largest": left_out(lambda mask: mask.min() > 0),
}


def model_of(forward: Callable[..., Tensor]) -> nn.Module:
    return Functional(forward, a=linear(4, 6), b=linear(6, 3))


def batch(n: int, masked: set[int], large: set[int] = frozenset(), length: int = 5) -> Batch:  # type: ignore[assignment]
    x, mask = real(n, length, 4), torch.ones(n, length, dtype=torch.float64)
    for i in masked:
        mask[i, 3:] = 0
    for i in large:
        x[i, 0, 0] = 9.0
    return (x.to(DEVICE), mask.to(DEVICE)), real(n).to(DEVICE)


BATCHES: list[Batch] = [
    batch(8, set()),
    batch(8, {1, 4}),
    batch(8, set(range(8))),
    batch(8, {1, 4}, {3}),
    batch(8, set(), {6}),
    batch(8, {7}),
    batch(12, {5, 6}, {1, 5}),
    batch(1, {0}),
    batch(2, {0}),
    batch(3, {0}, {1}),
    batch(5, {0}),  # as many samples as positions
    batch(8, set(), set(range(8))),
    batch(8, set()),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("forward", [*map(left_out, LEFT_OUT.values()), *OTHERS.values()], ids=[*LEFT_OUT, *OTHERS])
def test_batches_that_answer_otherwise_are_right_in_turn(forward: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """A hundredth would be near enough for a ReLU's kink; what belongs to a branch must be told apart from it."""
    model = model_of(forward).to(DEVICE, dtype)
    close = CLOSE if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    ours, loop = (get_backend(name).grads(model, squares) for name in ("bookkeeping", "naive"))
    for (x, mask), y in BATCHES:
        found = (fn((x.to(dtype, copy=True), mask.to(dtype, copy=True)), y.to(dtype)) for fn in (ours, loop))
        torch.testing.assert_close(*found, **close)


@pytest.mark.parametrize("ask", LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_makes_no_difference_costs_nothing(ask: Callable[[Tensor], Any]) -> None:
    ways = Ways(Passes(own_copy(model_of(left_out(ask)).to(DEVICE, torch.float64)), squares))
    for inputs, targets in BATCHES:
        if len(targets) > 1:
            assert ways.way(inputs, targets).name == "over the batch"


def test_a_way_is_looked_at_once() -> None:
    """Samples with a mask are a batch of their own, those without one another."""
    ways = Ways(Passes(own_copy(model_of(left_out(LEFT_OUT["all"])).to(DEVICE, torch.float64)), squares))
    for masked in ({1, 2}, set(), {3, 4, 5}, set(range(8)), {0, 7}):
        ways(*batch(8, masked), itself)
    assert {known.answers: looks for known, looks in ways.looks.items()} == {(True,): 1, (False,): 1}


def test_a_loss_that_asks_is_right() -> None:
    def capped(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = squares(outputs, targets)
        return losses.clamp(max=losses.detach().median()) if (losses > 20).any() else losses

    model = model_of(any_is_large).to(DEVICE, torch.float64)
    ours, loop = (get_backend(name).grads(model, capped) for name in ("bookkeeping", "naive"))
    for scale in (1, 9):
        inputs, targets = batch(8, {1})
        assert_close(ours(inputs, scale * targets), loop(inputs, scale * targets))


def test_a_model_that_answers_in_ever_other_ways_is_not_looked_at_for_ever() -> None:
    def forward(s: Any, x: Tensor, mask: Tensor) -> Tensor:
        h = s.a(x)
        for k in range(8):
            if (x[:, 0, 0] > k).all():
                h = h + 0.1
        return s.b(mean(h, mask))  # type: ignore[no-any-return]

    model = model_of(forward).to(DEVICE, torch.float64)
    ways, loop = Ways(Passes(own_copy(model), squares)), get_backend("naive").grads(model, squares)
    for _ in range(30):
        (x, mask), y = batch(8, {1})
        x[:, 0, 0] = 8 * torch.rand(8, dtype=x.dtype, device=x.device)
        assert_close(ways((x, mask), y, lambda name, g: g.rows(slice(None))), loop((x, mask), y))
    assert len(ways.known) <= 18


def test_where_a_parameter_changes_a_tensor_samples_are_run_under_vmap_with_the_batchs_answers() -> None:
    def forward(s: Any, x: Tensor, mask: Tensor) -> Tensor:
        h = x.clone().atan2_(s.w)
        return s.b(h.mean(1) if mask.all() else mean(h, mask))  # type: ignore[no-any-return]

    model = Functional(forward, w=nn.Parameter(real(4)), b=linear(4, 3)).to(DEVICE, torch.float64)
    ways = Ways(Passes(own_copy(model), squares))
    loop = get_backend("naive").grads(model, squares)
    for inputs, targets in BATCHES[:7]:
        assert ways.way(inputs, targets).name == "under vmap"
        found = ways(inputs, targets, lambda name, g: g.rows(slice(None)))
        assert_close(found, loop(inputs, targets))


def test_dropout_hides_no_answers() -> None:
    """Dropout draws anew in each call, so it is zeros that show."""

    def forward(s: Any, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.dropout(s.a(x), 0.5, True)
        return s.b(mean(h * 0 if (x > 8).any() else h, mask))  # type: ignore[no-any-return]

    fn = get_backend("bookkeeping").grads(model_of(forward).to(DEVICE, torch.float64), squares)
    for large in (set(), {3}):
        (x, mask), y = batch(8, {1}, large)
        found = fn((x, mask), y)["b.weight"].flatten(1).any(1)
        assert found.tolist() == [i not in large for i in range(8)]


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_groups_are_put_together_in_half_precision(quantity: str) -> None:
    model = model_of(left_out(LEFT_OUT["all"])).to(DEVICE).half()
    (x, mask), y = batch(8, {1})
    call = (x.half(), mask.half()), y.half()
    ours, loop = (getattr(get_backend(b), quantity)(model, squares)(*call) for b in ("bookkeeping", "naive"))
    for name, right in loop.items() if isinstance(loop, dict) else [("", loop)]:
        assert ((ours[name] if name else ours) - right).norm() <= 1e-2 * right.norm()


def test_a_graph_that_cannot_ask_is_refused() -> None:
    fn = get_backend("bookkeeping", compile=True).norms(model_of(left_out(LEFT_OUT["all"])).to(DEVICE), squares)
    (x, mask), y = batch(8, {1})
    with pytest.raises(Unsupported, match=r"compile=True\): the model asks for values, such as `mask.all\(\)`"):
        fn((x.float(), mask.float()), y.float())


def test_a_model_that_changes_its_inputs_gets_them_whole() -> None:
    def forward(s: Any, x: Tensor, mask: Tensor) -> Tensor:
        x.mul_(2)
        h = s.a(x).tanh()
        return s.b(h.mean(1) if mask.all() else mean(h, mask))  # type: ignore[no-any-return]

    model = model_of(forward).to(DEVICE, torch.float64)
    ours, loop = (get_backend(name).grads(model, squares) for name in ("bookkeeping", "naive"))
    for (x, mask), y in BATCHES[:6]:
        assert_close(ours((x.clone(), mask), y), loop((x.clone(), mask), y))


def test_right_is_right_by_every_quantity() -> None:
    assert_right(model_of(left_out(LEFT_OUT["all"])).to(DEVICE, torch.float64), *batch(8, {1, 4}))


@pytest.mark.parametrize("quantity", ["grads", "variance"])
def test_a_part_of_large_gradients_may_have_none_of_a_group(quantity: str) -> None:
    def forward(s: Any, x: Tensor, mask: Tensor) -> Tensor:
        h = F.linear(x, s.a.weight * s.a.weight)
        return h.mean(1) if mask.all() else mean(h, mask)

    model = Functional(forward, a=nn.Linear(600, 600, bias=False)).to(DEVICE, torch.float64)
    inputs, targets = (real(16, 2, 600).to(DEVICE), torch.ones(16, 2, device=DEVICE)), real(16).to(DEVICE)
    inputs[1][3, 1] = 0
    ours, loop = (getattr(get_backend(b), quantity)(model, squares) for b in ("bookkeeping", "naive"))
    assert_close(ours(inputs, targets), loop(inputs, targets))


@pytest.mark.parametrize("masked", [True, False])
def test_hugging_faces_masks_cost_nothing(masked: bool) -> None:
    """Its models ask `if mask.all():`, or whether there is padding and no mask."""
    pytest.importorskip("transformers")
    size = {"vocabulary": 100, "width": 16, "depth": 1, "heads": 2}
    problem = make_problem(
        "bert",
        "text",
        "cross_entropy",
        model_options={**size, "masked": masked},
        data_options={"length": 8, "vocabulary": 100, "classes": 3},
        batch_size=6,
        dtype=torch.float64,
        device=DEVICE,
    )
    ways = Ways(Passes(own_copy(problem.model), problem.loss_fn))
    loop = get_backend("naive").grads(problem.model, problem.loss_fn)
    for inputs, targets in ((problem.inputs, problem.targets), (problem.fresh_inputs, problem.fresh_targets)):
        assert ways.way(inputs, targets).name == "over the batch"
        assert_close(ways(inputs, targets, lambda name, g: g.rows(slice(None))), loop(inputs, targets))
