"""Norms may round as torch's own norm rounds, clipped sums as an ordinary backward pass, and no more."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from backends.base import clip_factors
from backends.batch import call
from testbed.agreement import Calibrated
from testbed.problems import Problem, make_problem
from testbed.referee import Referee

Grads = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def filled() -> Problem:
    """Return a problem whose sequences are filled up with one token: thousands of terms in one row of the embedding."""
    return make_problem("embedding_classifier", "text", "cross_entropy", batch_size=16)


def ordinary(p: Problem) -> Grads:
    """Return the clipped sum by an ordinary backward pass, its factors from float64."""
    wide = p.to(torch.float64)
    parameters = dict(p.model.named_parameters())
    norms = [
        sum(g.square().sum() for g in torch.autograd.grad(loss, list(wide.model.parameters()), retain_graph=True))
        for loss in wide.loss_fn(call(wide.model, wide.inputs), wide.targets)
    ]
    factors = clip_factors(torch.stack(norms).sqrt(), 1.0).float()  # type: ignore[arg-type]
    total = (p.loss_fn(call(p.model, p.inputs), p.targets) * factors).sum()
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


WRONG: dict[str, Callable[[Grads], Grads]] = {
    "0.1 % too long": lambda g: {k: t * 1.001 for k, t in g.items()},
    "rounded to bfloat16": lambda g: {k: t.bfloat16().float() for k, t in g.items()},
    "one parameter 0.01 % too long": lambda g: {**g, "embedding.weight": g["embedding.weight"] * 1.0001},
}


def finding(p: Problem, result: Any) -> str:
    return Referee(p, "clipped_sum", {}, Calibrated()).precision(result).status


def test_an_ordinary_sum_is_right(filled: Problem) -> None:
    assert finding(filled, ordinary(filled)) == "ok"


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_is_further_off_is_not(filled: Problem, change: Callable[[Grads], Grads]) -> None:
    assert finding(filled, change(ordinary(filled))) == "disagrees"


@pytest.fixture(scope="module")
def long() -> Problem:
    """Return a problem with a parameter of a million numbers, whose squares torch's norm adds with few running sums."""
    return make_problem("mlp", "random", "cross_entropy", model_options={"hidden": [1024, 1024]}, batch_size=4)


def torch_norms(p: Problem) -> torch.Tensor:
    """Return norms by torch's own, parameter by parameter."""
    losses = p.loss_fn(call(p.model, p.inputs), p.targets)
    grads = [torch.autograd.grad(loss, list(p.model.parameters()), retain_graph=True) for loss in losses]
    return torch.stack([torch.stack([g.norm() for g in each]).norm() for each in grads])


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (1.001, "disagrees")])
def test_norms_may_round_as_torchs_own(long: Problem, factor: float, status: str) -> None:
    assert Referee(long, "norms", {}, Calibrated()).precision(torch_norms(long) * factor).status == status


def test_a_clipped_sum_may_be_clipped_by_norms_like_that(long: Problem) -> None:
    found = ordinary(long)
    exact = Referee(long, "norms", {}, Calibrated()).truth.exact()
    assert isinstance(exact, torch.Tensor)
    share = float((torch_norms(long).double() / exact).mean())
    assert finding(long, {k: t / share for k, t in found.items()}) == "ok"
