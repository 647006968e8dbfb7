"""Dropout with given masks: the masks are dropout's, each sample keeps its own, and every backend agrees under them."""

import pytest
import torch
from torch import Tensor, nn

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
