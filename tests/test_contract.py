"""The contract, for every backend that discovery finds × every case. A new backend enters by itself."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from backends import backend_class, get_backend, variants
from backends.base import QUANTITIES, Backend, Unavailable, Unsupported, own_copy, trainable
from backends.batch import apply, call, size, take
from testbed.integrity import Snapshot
from tests.asserts import assert_close, assert_form
from tests.cases import Case, cases
from tests.conftest import truth

CASES = cases()
Run = Callable[..., Any]


@pytest.fixture(params=variants(), ids=lambda v: f"{v[0]}{v[1] or ''}")
def backend(request: pytest.FixtureRequest) -> Backend:
    name, options = request.param
    try:
        backend_class(name).load()
    except Unavailable as absence:
        pytest.skip(str(absence))
    return get_backend(name, **options)


@pytest.fixture(params=CASES, ids=lambda c: c.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_grads_have_the_contracts_form(backend: Backend, case: Case, run: Run) -> None:
    assert_form(run(backend, case), case)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_quantity_equals_the_reference(backend: Backend, case: Case, quantity: str, run: Run) -> None:
    assert_close(run(backend, case, quantity), truth(case.name, quantity))


def test_caller_finds_everything_as_it_was(backend: Backend, case: Case, run: Run) -> None:
    for p in case.model.parameters():
        p.grad = torch.ones_like(p)
    snapshot = Snapshot(case.model)
    try:
        run(backend, case)
    finally:
        assert snapshot.change() is None
        case.model.zero_grad()


def test_grads_sum_to_the_batch_gradient(backend: Backend, case: Case, run: Run) -> None:
    model = own_copy(case.model)
    parameters = trainable(model)
    loss = case.loss_fn(call(model, case.inputs), case.targets).sum()
    total = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    grads = run(backend, case)
    assert_close({name: g.sum(0) for name, g in grads.items()}, dict(zip(parameters, total, strict=True)))


def test_permuted_samples_give_permuted_rows(backend: Backend, case: Case, run: Run) -> None:
    order = torch.arange(size(case.inputs), device=case.targets.device).flip(0)
    grads = run(backend, case)
    moved = get_fn(backend, case)(take(case.inputs, order), case.targets[order])
    assert_close(moved, {name: g[order] for name, g in grads.items()})


def test_calls_repeat_and_do_not_accumulate(backend: Backend, case: Case, run: Run) -> None:
    first = run(backend, case)
    fn = get_fn(backend, case)
    for _ in range(3):
        assert_close(fn(case.inputs, case.targets), first)


def test_results_stay_valid_after_the_next_call(backend: Backend, case: Case, run: Run) -> None:
    run(backend, case)
    fn = get_fn(backend, case)
    first = fn(case.inputs, case.targets)
    kept = copy.deepcopy(first)
    fn(apply(lambda t: t.flip(0), case.inputs), case.targets)
    assert_close(first, kept)


def test_batches_of_another_length_work(backend: Backend, case: Case, run: Run) -> None:
    grads = run(backend, case)
    fn = get_fn(backend, case)
    fn(case.inputs, case.targets)
    one = fn(take(case.inputs, slice(0, 1)), case.targets[:1])
    assert_close(one, {name: g[:1] for name, g in grads.items()})


def get_fn(backend: Backend, case: Case) -> Callable[..., Any]:
    return backend.grads(case.model, case.loss_fn)


def test_optimizer_steps_are_seen(backend: Backend) -> None:
    case = next(c for c in cases() if c.name == "mlp")
    fn = get_fn(backend, case)
    fn(case.inputs, case.targets)
    with torch.no_grad():
        for p in case.model.parameters():
            p.mul_(0.5)
    assert_close(fn(case.inputs, case.targets), get_fn(get_backend("naive"), case)(case.inputs, case.targets))


def test_works_where_the_caller_has_switched_gradients_off(backend: Backend) -> None:
    case = next(c for c in CASES if c.name == "mlp")
    with torch.no_grad():
        grads = get_fn(backend, case)(case.inputs, case.targets)
    assert_close(grads, truth("mlp", "grads"))


def test_float32_stays_float32(backend: Backend) -> None:
    case = next(c for c in CASES if c.name == "mlp")
    model = copy.deepcopy(case.model).float()
    grads = backend.grads(model, case.loss_fn)(case.inputs.float(), case.targets)
    assert {g.dtype for g in grads.values()} == {torch.float32}


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_clipped_sum_follows_its_definition(backend: Backend, factor: float) -> None:
    case = next(c for c in CASES if c.name == "dead sample")  # one gradient is zero
    grads = truth(case.name, "grads")
    norms = torch.cat([g.flatten(1) for g in grads.values()], 1).norm(dim=1)
    limit = float(norms.median()) * factor
    expected = {
        name: sum(g[i] * (min(1.0, limit / float(norms[i])) if norms[i] else 1.0) for i in range(len(norms)))
        for name, g in grads.items()
    }
    assert_close(backend.clipped_sum(case.model, case.loss_fn, max_norm=limit)(case.inputs, case.targets), expected)


def test_nonfinite_gradient_is_not_hidden_by_clipping(backend: Backend) -> None:
    case = next(c for c in CASES if c.name == "mlp")
    inputs = case.inputs.clone()
    inputs[1] = torch.nan
    clipped = backend.clipped_sum(case.model, case.loss_fn, max_norm=1.0)(inputs, case.targets)
    assert any(t.isnan().any() for t in clipped.values())


TRAPS = {
    "BatchNorm in training mode": (
        torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4)),
        "`1` (BatchNorm1d)",
    ),
    "BatchNorm without statistics": (
        torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4, track_running_stats=False)).eval(),
        "track_running_stats=False",
    ),
    "nothing to train": (torch.nn.Linear(5, 4).requires_grad_(False), "no trainable parameter"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_what_has_no_gradient_is_refused_with_the_place(backend: Backend, trap: str) -> None:
    model, place = TRAPS[trap]
    with pytest.raises(Unsupported) as refusal:
        backend.grads(model, lambda o, t: o.sum(1))(torch.ones(3, 5), torch.ones(3))
    assert place in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_refusal_is_one_line_that_names_a_place(backend: Backend, case: Case) -> None:
    refusal = ""
    try:
        get_fn(backend, case)(case.inputs, case.targets)
    except Unsupported as error:
        refusal = str(error)
    assert not refusal or ("`" in refusal and "\n" not in refusal), f"no module or parameter is named: {refusal}"
