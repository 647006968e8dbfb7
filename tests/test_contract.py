"""The contract, for every backend that discovery finds × every case. A new backend enters by itself."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from backends import available, backend_class, get_backend, variants
from backends.base import (
    QUANTITIES,
    Backend,
    GradsFn,
    LossFn,
    Named,
    Unavailable,
    Unsupported,
    own_copy,
    trainable,
)
from backends.batch import Batch, apply, call, size, take
from backends.rows import tensors_in
from testbed.agreement import Calibrated, as_rows, distance
from testbed.integrity import Snapshot
from testbed.problems import Problem
from testbed.referee import Referee
from tests.asserts import assert_close, assert_form
from tests.cases import DEVICE, Case, cases
from tests.conftest import truth

CASES = cases()
Run = Callable[..., Any]


@pytest.fixture(params=variants(), ids=lambda v: f"{v[0]}{v[1] or ''}")
def backend(request: pytest.FixtureRequest) -> Backend:
    name, options = request.param
    loaded(name)
    return get_backend(name, **options)


@pytest.fixture(params=CASES, ids=lambda c: c.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_grads_have_the_contracts_form(backend: Backend, case: Case, run: Run) -> None:
    assert_form(run(backend, case), case)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_quantity_equals_the_reference(backend: Backend, case: Case, quantity: str, run: Run) -> None:
    assert_close(run(backend, case, quantity), truth(case.name, quantity))


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_the_reference_follows_the_definitions(case: Case, quantity: str) -> None:
    grads = truth(case.name, "grads")
    flat = torch.cat([g.reshape(size(case.inputs), -1) for g in grads.values()], 1)
    norms = flat.square().sum(1).sqrt()
    factors = torch.where(norms > 1, 1 / norms, 1.0)
    expected = {
        "grads": grads,
        "norms": norms,
        "clipped_sum": {k: torch.tensordot(factors, g, 1) for k, g in grads.items()},
        "variance": {k: (g - g.mean(0)).square().mean(0) for k, g in grads.items()},
        "gram": flat @ flat.T,
    }
    assert_close(truth(case.name, quantity), expected[quantity])


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


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", ["tutorial", "position embeddings", "MultiheadAttention", "LSTM"])
def test_nothing_is_made_on_the_default_device(backend: Backend, name: str, quantity: str, run: Run) -> None:
    with torch.device("meta"):  # as elsewhere as a GPU's model is from the CPU, where there is no GPU
        found = run(backend, next(c for c in CASES if c.name == name), quantity)
    assert_close(found, truth(name, quantity))


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_batch_of_no_samples_is_refused_with_the_reason(backend: Backend, quantity: str) -> None:
    case = named("mlp")
    if quantity not in backend.quantities:
        pytest.skip(f"computes {', '.join(backend.quantities)} only")
    fn = getattr(backend, quantity)(case.model, case.loss_fn)
    with pytest.raises(ValueError, match="a batch holds at least one sample, found none"):
        fn(take(case.inputs, slice(0, 0)), case.targets[:0])


def get_fn(backend: Backend, case: Case) -> Callable[..., Any]:
    return backend.grads(case.model, case.loss_fn)


def some(backend: Backend, case: Case) -> tuple[str, Callable[..., Any]]:
    """Return the first quantity that a backend computes, and its function."""
    quantity = backend.quantities[0]
    return quantity, getattr(backend, quantity)(case.model, case.loss_fn)


def named(name: str) -> Case:
    """Return a case, made anew."""
    return next(c for c in cases() if c.name == name)


def test_optimizer_steps_are_seen(backend: Backend) -> None:
    case = named("mlp")
    quantity, fn = some(backend, case)
    fn(case.inputs, case.targets)
    with torch.no_grad():
        for p in case.model.parameters():
            p.mul_(0.5)
    truth = getattr(get_backend("naive"), quantity)(case.model, case.loss_fn)(case.inputs, case.targets)
    assert_close(fn(case.inputs, case.targets), truth)


def test_works_where_the_caller_has_switched_gradients_off(backend: Backend) -> None:
    case = named("mlp")
    with torch.no_grad():
        quantity, fn = some(backend, case)
        result = fn(case.inputs, case.targets)
    assert_close(result, truth("mlp", quantity))


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_float32_stays_float32(backend: Backend, quantity: str, run: Run) -> None:
    case = named("mlp")
    narrow = replace(case, model=copy.deepcopy(case.model).float(), inputs=case.inputs.float())
    assert {t.dtype for t in tensors_in(run(backend, narrow, quantity))} == {torch.float32}


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_other_batches_follow_in_the_same_function(backend: Backend, quantity: str, run: Run) -> None:
    case = named("tutorial")
    few = [take(case.inputs, slice(0, n)) for n in (3, 2, 3)]
    run(backend, replace(case, inputs=few[0], targets=case.targets[:3]), quantity)
    fn = getattr(backend, quantity)(case.model, case.loss_fn)
    expected = getattr(get_backend("naive"), quantity)(case.model, case.loss_fn)
    for inputs in few:
        targets = case.targets[: size(inputs)]
        assert_close(fn(inputs, targets), expected(inputs, targets))


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_clipped_sum_follows_its_definition(backend: Backend, factor: float, run: Run) -> None:
    case = named("dead sample")  # one gradient is zero
    grads = truth(case.name, "grads")
    norms = torch.cat([g.flatten(1) for g in grads.values()], 1).norm(dim=1)
    limit = float(norms.median()) * factor
    expected = {
        name: sum(g[i] * (min(1.0, limit / float(norms[i])) if norms[i] else 1.0) for i in range(len(norms)))
        for name, g in grads.items()
    }
    assert_close(run(backend, case, "clipped_sum", max_norm=limit), expected)


@pytest.mark.parametrize("quantity", ["norms", "clipped_sum"])
def test_nonfinite_gradient_is_not_hidden(backend: Backend, quantity: str, run: Run) -> None:
    case = named("mlp")
    inputs = case.inputs.clone()
    inputs[1] = torch.nan
    found = tensors_in(run(backend, replace(case, inputs=inputs), quantity))
    assert any(t.isnan().any() for t in found)


@pytest.mark.parametrize("quantity", ["norms", "clipped_sum"])
def test_norms_that_cancel_are_right_or_found_out(backend: Backend, quantity: str) -> None:
    """Activations near a constant, output gradients of mean zero: ⟨aaᵀ, ggᵀ⟩ cancels, and clamped means unclipped."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64, bias=False).to(DEVICE)
        inputs, signs = 10 + 1e-3 * torch.randn(4, 512, 64), torch.randn(4, 512, 64)
    inputs, signs = inputs.to(DEVICE), (signs - signs.mean(1, keepdim=True)).to(DEVICE)
    problem = Problem(model, lambda o, t: (o * t).flatten(1).sum(1), inputs, signs, inputs, signs)
    referee = Referee(problem, quantity, {}, Calibrated())
    try:
        result = getattr(backend, quantity)(model, problem.loss_fn)(inputs, signs)
    except Unsupported:
        return
    rows, right = (as_rows(r, quantity) for r in (result, referee.truth.exact()))
    off = max(float(distance(rows, right)[:, i].max() / right[k].norm()) for i, k in enumerate(right))
    assert off < 0.05 or referee.precision(result).status != "ok", f"off by {off:.1e}, and not found out"


def loaded(name: str) -> None:
    """Skip the test where the backend's library is not installed."""
    try:
        backend_class(name).load()
    except Unavailable as absence:
        pytest.skip(str(absence))


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"chunk_bytes": 1}], ids=str)
@pytest.mark.parametrize("name", available())
def test_chunks_change_nothing(name: str, options: dict[str, int], quantity: str, run: Run) -> None:
    loaded(name)
    case = replace(named("dead sample"), may_refuse=True)  # what a library computes whole cannot be merged
    assert_close(run(get_backend(name, **options), case, quantity), truth(case.name, quantity))


@pytest.mark.parametrize("quantity", [q for q in QUANTITIES if q != "grads"])
@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"chunk_bytes": 2 * 34 * 8}], ids=str)  # 34 float64 a sample
def test_a_derived_quantity_never_holds_more_than_a_chunk(options: dict[str, int], quantity: str, run: Run) -> None:
    case, sizes = named("mlp"), []

    @dataclass(frozen=True)
    class Recording(Backend):
        def grads(self, model: torch.nn.Module, loss_fn: LossFn) -> GradsFn:
            right = get_backend("vmap").grads(model, loss_fn)

            def fn(inputs: Batch, targets: torch.Tensor) -> Named:
                sizes.append(size(inputs))
                return right(inputs, targets)

            return fn

    many = replace(case, inputs=case.inputs.repeat(3, 1), targets=case.targets.repeat(3))
    assert_close(run(Recording(**options), many, quantity), run(get_backend("naive"), many, quantity))
    assert max(sizes) == 2
    assert len(sizes) >= size(many.inputs) / 2


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", available())
def test_autocast_is_near_the_reference_under_autocast(name: str, quantity: str, run: Run) -> None:
    loaded(name)
    case = named("tutorial")
    narrow = replace(case, model=copy.deepcopy(case.model).float(), inputs=case.inputs.float(), may_refuse=True)
    result = run(get_backend(name, autocast="bfloat16"), narrow, quantity)
    expected = run(get_backend("naive", autocast="bfloat16"), narrow, quantity)
    assert {t.dtype for t in tensors_in(result)} == {torch.float32}
    for a, b in zip(tensors_in(result), tensors_in(expected), strict=True):
        assert (a - b).norm() <= 0.1 * b.norm()


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_vmap_runs_no_op_sample_by_sample(quantity: str, run: Run, recwarn: pytest.WarningsRecorder) -> None:
    run(get_backend("vmap"), named("tutorial"), quantity)
    assert not [w for w in recwarn if "performance drop" in str(w.message)]  # what it says of ops without a rule


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("name", ["vmap", "naive"])  # by the backend itself, and by what wraps any
def test_a_compiled_backend_is_the_same_function(name: str) -> None:
    case = named("mlp")
    for quantity in ("grads", "norms"):
        fn = getattr(get_backend(name, compile=True), quantity)(case.model, case.loss_fn)
        assert_close(fn(case.inputs, case.targets), truth("mlp", quantity))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there a CUDA graph is recorded")
@pytest.mark.parametrize("name", available())
def test_a_cuda_graph_without_cuda_is_refused(name: str) -> None:
    loaded(name)
    with pytest.raises(Unsupported, match=r"`model` \(cuda_graph=True\): it is on cpu"):
        some(get_backend(name, cuda_graph=True), named("mlp"))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("name", available())
def test_a_cuda_graph_replays_the_same_function(name: str) -> None:
    loaded(name)
    case = named("mlp")
    try:
        quantity, fn = some(get_backend(name, cuda_graph=True), case)
        first = fn(case.inputs, case.targets)
    except Unsupported as refusal:
        pytest.skip(str(refusal))
    fn(case.inputs.flip(0), case.targets)
    assert_close(first, truth("mlp", quantity))


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
        getattr(backend, backend.quantities[0])(model, lambda o, t: o.sum(1))(torch.ones(3, 5), torch.ones(3))
    assert place in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_refusal_is_one_line_that_names_a_place(backend: Backend, case: Case) -> None:
    refusal = ""
    try:
        get_fn(backend, case)(case.inputs, case.targets)
    except Unsupported as error:
        refusal = str(error)
    assert not refusal or ("`" in refusal and "\n" not in refusal), f"no module or parameter is named: {refusal}"


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_failed_call_leaves_the_next_one_right(backend: Backend, quantity: str, where: str, run: Run) -> None:
    case = next(c for c in CASES if c.name == "mlp")
    broken: list[str] = []

    def fail(*_: Any) -> None:
        if broken:
            raise ZeroDivisionError

    class Fragile(torch.nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if broken == ["forward"]:
                raise ZeroDivisionError
            if broken:
                x.register_hook(fail)
            return x

    fragile = replace(case, model=torch.nn.Sequential(*case.model[:-1], Fragile(), case.model[-1]))
    run(backend, fragile, quantity)
    fn = getattr(backend, quantity)(fragile.model, fragile.loss_fn)
    expected = fn(case.inputs, case.targets)
    broken.append(where)
    with pytest.raises(ZeroDivisionError):
        fn(case.inputs, case.targets)
    broken.clear()
    assert_close(fn(case.inputs, case.targets), expected)


@pytest.mark.usefixtures("own_random_state")
@pytest.mark.parametrize("kind", [torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU])
def test_a_recurrent_layer_whose_backward_pass_cudnn_lacks_is_refused(
    kind: type[torch.nn.RNNBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Sequential(kind(3, 2)).eval()
    own_copy(model)  # cuDNN runs nothing on a CPU
    monkeypatch.setattr("backends.refusals._by_cudnn", lambda module: next(module.parameters()).requires_grad)
    with pytest.raises(Unsupported, match=r"`0` \(\w+\) in eval mode is run by cuDNN, which has no backward pass"):
        own_copy(model)
    own_copy(model.train())
    own_copy(torch.nn.Sequential(kind(3, 2).requires_grad_(False).eval(), torch.nn.Linear(2, 1)))
