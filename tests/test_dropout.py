"""Dropout with given masks: the masks are dropout's, each sample keeps its own, and every backend agrees under them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import testbed
from backends import available, backend_class, get_backend
from backends.batch import call, size, take
from testbed.checks import refuse_without_gradients
from testbed.dropout import with_masks
from testbed.problems import Problem
from tests.asserts import assert_close
from tests.cases import Functional, squares

N = 6


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def twice_dropped() -> nn.Module:
    """A model that calls one dropout twice and another once."""
    return Functional(
        lambda s, x: s.c(s.drop(s.b(s.other(s.drop(s.a(x)).tanh())))),
        a=nn.Linear(5, 4),
        b=nn.Linear(4, 4),
        c=nn.Linear(4, 2),
        drop=nn.Dropout(0.5),
        other=nn.Dropout(0.2),
    ).double()


def problem(form: str = "tensor") -> Problem:
    with torch.random.fork_rng(devices=[]):
        model = twice_dropped()
    inputs = {"tensor": normal(N, 5), "tuple": (normal(N, 5),), "dict": {"x": normal(N, 5)}}[form]
    if form == "dict":
        model._forward = lambda s, x, f=model._forward: f(s, x)  # type: ignore[assignment, misc]
    return Problem(model, squares, inputs, normal(N), take(inputs, slice(0, 3)), normal(3))


def test_random_states_of_other_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` seeds every GPU, and what is put back is the state of the problem's device alone."""
    seeded = list[int]()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    refuse_without_gradients(with_masks(problem()))
    assert not seeded


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_masks_become_inputs(form: str) -> None:
    p = with_masks(problem(form))
    assert size(p.inputs) == N
    assert size(p.fresh_inputs) == 3
    assert len(p.inputs) == 1 + 3  # type: ignore[arg-type]


def test_masks_are_those_of_dropout() -> None:
    """The masked model returns what the model returns under the seed that the masks were drawn with."""
    p = problem()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = call(p.model, p.inputs)
    masked = with_masks(p, seed=3)
    assert_close(call(masked.model, masked.inputs), expected)


def test_each_sample_keeps_its_mask_alone_or_in_the_batch() -> None:
    p = with_masks(problem())
    order = torch.arange(N).flip(0)
    assert_close(call(p.model, take(p.inputs, order)), call(p.model, p.inputs)[order])


@pytest.mark.parametrize("backend", ["vmap", "opacus", "backpack"])
def test_backends_agree_under_the_same_masks(backend: str) -> None:
    p = with_masks(problem())
    loop, other = (get_backend(name).grads(p.model, p.loss_fn)(p.inputs, p.targets) for name in ("naive", backend))
    if backend == "backpack":
        assert set(other) == set(loop)
    assert_close(other, loop)


@pytest.mark.usefixtures("own_random_state")
def test_a_checkpoint_asks_again_for_the_mask_it_had() -> None:
    block = nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.Tanh())
    model = Functional(lambda s, x: checkpoint(s.block, x, use_reentrant=False), block=block).double()
    p = with_masks(Problem(model, squares, normal(N, 5), normal(N), normal(3, 5), normal(3)))
    assert size(p.inputs) == N
    assert len(p.inputs) == 2
    plain = replace(p, model=Functional(lambda s, x: s.block(x), block=block).double())
    with torch.random.fork_rng(devices=[]):
        plain = with_masks(replace(plain, inputs=normal(N, 5), fresh_inputs=normal(3, 5)))
    found, expected = (get_backend("naive").grads(q.model, q.loss_fn)(q.inputs, q.targets) for q in (p, plain))
    assert_close(found, expected)


def sequence_first(s: Any, x: Tensor) -> Tensor:
    return s.drop(s.a(x.transpose(0, 1))).mean(0)  # type: ignore[no-any-return]


def twice_in_a_checkpoint(s: Any, x: Tensor) -> Tensor:
    def block(x: Tensor) -> Tensor:
        return s.drop(s.a(s.drop(x)))  # type: ignore[no-any-return]

    return checkpoint(block, x, use_reentrant=False)  # type: ignore[no-any-return]


STAY_RANDOM: dict[str, tuple[Callable[[Any, Tensor], Tensor], Tensor]] = {
    "the samples are on the second axis, which is as long as the first": (sequence_first, normal(N, N, 5)),
    "a checkpoint asks again for several masks, the last one first": (twice_in_a_checkpoint, normal(N, 5)),
    "the model does not run": (lambda s, x: s.drop(s.a(x[:, :2])), normal(N, 5)),
}


@pytest.mark.usefixtures("own_random_state")
@pytest.mark.parametrize("name", STAY_RANDOM)
def test_what_has_no_mask_for_each_sample_stays_random(name: str) -> None:
    forward, inputs = STAY_RANDOM[name]
    model = Functional(forward, a=nn.Linear(5, 5), drop=nn.Dropout()).double()
    p = Problem(model, squares, inputs, normal(N), inputs, normal(N))
    assert with_masks(p) is p


@pytest.mark.usefixtures("own_random_state")
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_a_hook_computes_is_copied_too() -> None:
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(5, 4)), nn.Dropout()).double()
    p = with_masks(Problem(model, squares, normal(N, 5), normal(N), normal(3, 5), normal(3)))
    assert len(p.inputs) == 2


def test_the_models_own_dropout_stays() -> None:
    p = problem()
    with_masks(p)
    assert isinstance(p.model.drop, nn.Dropout)
    assert not p.model._forward_pre_hooks


def test_a_run_says_that_masks_were_given() -> None:
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 1))
    everybody = [name for name in available() if "grads" in backend_class(name).quantities]
    report = testbed.compare(model, squares, normal(N, 5).float(), normal(N).float(), everybody, rounds=2, max_s=1)
    assert {r.status for r in report.records} == {"ok"}, [r.reason for r in report.records]
    assert "masks were drawn once and given to every backend" in " ".join(str(report).split())


class Attention(nn.Module):
    """Reads its dropout's p, as Hugging Face's models do, and drops by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.drop.p, self.training)


DRAWERS = {
    "an op of several modules": (
        nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(12, 1)),
        "`0.self_attn` (MultiheadAttention)",
        True,
    ),
    "a layer that returns a tuple": (
        Functional(lambda s, x: s.a(s.l(x)[0][:, -1]), a=nn.Linear(4, 1), l=nn.LSTM(4, 4, 2, True, True, 0.2)),
        "`l` (LSTM)",
        False,
    ),
    "a function, after a dropout with masks": (
        nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Dropout(), Attention(), nn.Linear(4, 1)),
        "`3` (Attention)",
        True,
    ),
    "a dropout that has no mask for each sample": (
        Functional(sequence_first, a=nn.Linear(4, 1), drop=nn.Dropout()),
        "`drop` (Dropout)",
        False,
    ),
    "a function between modules": (
        Functional(lambda s, x: s.a(nn.functional.dropout(s.f(x))), a=nn.Linear(12, 1), f=nn.Flatten()),
        "`model` (Functional)",
        False,
    ),
}


@pytest.mark.parametrize(("model", "where", "given"), DRAWERS.values(), ids=DRAWERS)
def test_what_draws_without_a_mask_is_named(model: nn.Module, where: str, given: bool) -> None:
    """And masks are spoken of only where they were given."""
    report = testbed.compare(model, squares, normal(N, 3, 4).float(), normal(N).float(), ["naive"], rounds=2, max_s=1)
    (record,) = report.records
    said = "is random: two forward passes under different seeds differ; use eval(), or set its dropout to 0"
    assert record.reason == f"the problem: {where} {said}"
    assert ("masks were drawn once" in str(report)) == given
