"""Where TF32 is allowed, a result that is rounded to it agrees, though the reference is not; here TF32 is imitated."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backends import get_backend, precision
from testbed.agreement import Calibrated
from testbed.problems import Problem, make_problem
from testbed.referee import Referee
from testbed.truth import TF32
from tests.cases import DEVICE

CUT = 13  # bits of float32's mantissa that TF32 has not


def rounded(t: Tensor) -> Tensor:
    bits = t.detach().contiguous().view(torch.int32)
    even = (bits >> CUT) & 1
    return (bits + (1 << CUT - 1) - 1 + even & -(1 << CUT)).view(torch.float32).view_as(t)


class RoundedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return rounded(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return rounded(g)


class Imitated(TorchFunctionMode):
    """Rounds what goes into products, forward and backward."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.linear, F.conv2d, torch.conv2d):
            return func(*args, **(kwargs or {}))
        x, w, *others = args
        return RoundedGradient.apply(func(RoundedInput.apply(x), RoundedInput.apply(w), *others, **(kwargs or {})))


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem("simple_cnn", "random", "nll", batch_size=16, device=DEVICE)


@precision.without_tf32()  # where there is any: what is rounded here shall be what is imitated
def ask(problem: Problem, quantity: str, u: float | None, scale: float = 1.0) -> str:
    referee = Referee(problem, quantity, {}, Calibrated())
    referee.truth.u = u
    with Imitated():
        result = getattr(get_backend("naive"), quantity)(problem.model, problem.loss_fn)(
            problem.inputs, problem.targets
        )
    if isinstance(result, Tensor):
        return referee.precision(result * scale).status
    return referee.precision({name: t * scale for name, t in result.items()}).status


@pytest.mark.parametrize("quantity", ["grads", "norms", "clipped_sum", "variance", "gram"])
def test_a_result_that_is_rounded_agrees_where_that_is_allowed(problem: Problem, quantity: str) -> None:
    assert ask(problem, quantity, TF32) == "ok"


@pytest.mark.parametrize("quantity", ["grads", "clipped_sum"])
def test_it_does_not_where_it_is_not_allowed(problem: Problem, quantity: str) -> None:
    assert ask(problem, quantity, None) == "disagrees"


def test_what_is_wrong_does_not_agree_either(problem: Problem) -> None:
    assert ask(problem, "grads", TF32, scale=1.05) == "disagrees"
