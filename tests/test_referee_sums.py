"""A clipped sum may round as an ordinary backward pass rounds, and no more."""

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
