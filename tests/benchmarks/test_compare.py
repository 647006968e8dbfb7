"""Every discovered backend and quantity on a few problems; agreement is asserted before anything is timed.

python -m pytest tests/benchmarks --benchmark-only
"""

from functools import cache
from typing import Any

import pytest
import torch

from backends import available, backend_class, get_backend
from backends.base import QUANTITIES, Unavailable, Unsupported
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


@cache
def problem(name: str) -> Problem:
    return make_problem(loss="nll", device=DEVICE, **PROBLEMS[name])


@cache
def referee(name: str, quantity: str) -> Referee:
    return Referee(problem(name), quantity, {}, Calibrated())


@pytest.mark.parametrize("backend", available())
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_quantity(benchmark: Any, name: str, quantity: str, backend: str) -> None:
    p, cls = problem(name), backend_class(backend)
    benchmark.group = f"{name}, {quantity}"
    native = cls.native(quantity)
    versions = environment(p.device)["versions"]
    benchmark.extra_info |= {"backend": backend, "native": native, "device": str(p.device), "versions": versions}
    try:
        cls.load()
        fn = getattr(get_backend(backend), quantity)(p.model, p.loss_fn)
        finding = referee(name, quantity).precision(fn(p.inputs, p.targets))
    except (Unsupported, Unavailable) as reason:
        pytest.skip(str(reason))
    assert finding.status == "ok", finding.diagnosis

    def call() -> None:
        fn(p.inputs, p.targets)
        synchronise(torch.device(p.device))  # pytest-benchmark does not

    benchmark(call)
