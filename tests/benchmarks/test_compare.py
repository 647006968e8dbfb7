"""Every discovered backend on a few problems, grouped by problem; agreement is asserted before anything is timed.

python -m pytest tests/benchmarks --benchmark-only
"""

from typing import Any

import pytest
import torch

from backends import available, backend_class, get_backend
from backends.base import Unavailable, Unsupported
from testbed.agreement import Calibrated
from testbed.environment import environment
from testbed.problems import Problem, make_problem
from testbed.referee import Referee
from testbed.timing import synchronise
from tests.cases import DEVICE

PROBLEMS: dict[str, dict[str, Any]] = {
    "tutorial": {"model": "simple_cnn", "data": "random", "batch_size": 64},
    "digits": {"model": "simple_cnn", "data": "digits", "batch_size": 16, "train_steps": 5},
    "mlp": {"model": "mlp", "data": "random", "batch_size": 64},
    "logistic": {"model": "logistic", "data": "random", "batch_size": 256},
}


@pytest.fixture(scope="module", params=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> tuple[str, Problem, Referee]:
    made = make_problem(loss="nll", device=DEVICE, **PROBLEMS[request.param])
    return request.param, made, Referee(made, "grads", {}, Calibrated())


@pytest.mark.parametrize("backend", available())
def test_grads(benchmark: Any, backend: str, problem: tuple[str, Problem, Referee]) -> None:
    name, p, referee = problem
    benchmark.group = name
    env = environment(p.device)
    benchmark.extra_info |= {"backend": backend, "device": str(p.device), "versions": env["versions"]}
    try:
        backend_class(backend).load()
        fn = get_backend(backend).grads(p.model, p.loss_fn)
        finding = referee.precision(fn(p.inputs, p.targets))
    except (Unsupported, Unavailable) as reason:
        pytest.skip(str(reason))
    assert finding.status == "ok", finding.diagnosis

    def call() -> None:
        fn(p.inputs, p.targets)
        synchronise(torch.device(p.device))  # pytest-benchmark does not

    benchmark(call)
