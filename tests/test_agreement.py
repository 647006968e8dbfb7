"""The agreement rules on made-up results: what is right passes, what is wrong by little does not."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm

from backends import get_backend
from testbed.agreement import AllClose, Calibrated, Rows, as_rows
from testbed.diagnosis import explain
from testbed.form import wrong_form
from testbed.problems import Problem, make_problem
from testbed.referee import Referee
from testbed.truth import Truth
from tests.cases import DEVICE, cross_entropy, mlp, real

N = 32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truth(n: int = N) -> Rows:
    return {"weight": normal(n, 40), "bias": normal(n, 5, seed=1) * 1e-3}


def rounded(rows: Rows, dtype: torch.dtype = torch.float32) -> Rows:
    return {name: t.to(dtype) for name, t in rows.items()}


def no_draw(k: int, size: float, rows: Tensor) -> Rows:
    """Stand for a problem without kinks: perturbed runs are where the unperturbed one is."""
    return {name: t[rows] for name, t in rounded(truth()).items()}


def exact_draw(k: int, size: float, rows: Tensor) -> Rows:
    """Stand for a problem that a perturbation does not move at all."""
    return {name: t[rows] for name, t in truth().items()}


def judge(result: Rows, **options: float) -> bool:
    t = truth()
    return Calibrated(**options).judge(result, t, [rounded(t)], no_draw, per_sample=True).agrees  # type: ignore[arg-type]


def spoil(row: int | slice, name: str, factor: float) -> Rows:
    g = rounded(truth())
    g[name] = g[name].clone()
    g[name][row] *= factor
    return g


def test_rounding_agrees() -> None:
    assert judge(rounded(truth()))


def by_a_function_of_its_own() -> nn.Module:
    model = mlp()
    inner = model[0].forward
    model[0].forward = lambda x: inner(x)
    return model


@pytest.mark.parametrize(
    "model",
    [mlp, by_a_function_of_its_own, lambda: nn.Sequential(weight_norm(nn.Linear(5, 2)))],
    ids=["plain", "a function of its own", "weight norm"],
)
@pytest.mark.usefixtures("own_random_state")
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_perturbed_run_is_of_the_model(model: Callable[[], nn.Module]) -> None:
    """Whatever a copy of it must see to; the caller's own is left as it was."""
    made = model().to(DEVICE)
    batch = real(N, 5).float(), torch.zeros(N, dtype=torch.long, device=DEVICE)
    known = Truth(Problem(made, cross_entropy, *batch, *batch), "grads", {})
    drawn, right = known.draws()(0, 1e-6, torch.arange(N)), as_rows(known.exact(), "grads")
    for name, g in right.items():
        assert 0 < (drawn[name] - g).norm() < 1e-4 * g.norm()
    assert all(p.grad is None for p in made.parameters())


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("row", [3, slice(None)], ids=["one sample", "all samples"])
@pytest.mark.parametrize("factor", [0.0, -1.0, 1 / N, 0.999, 1.01, 1 + 1e-4, torch.nan])
def test_an_error_disagrees(factor: float, row: int | slice, name: str) -> None:
    assert not judge(spoil(row, name, factor))


def test_results_of_a_lower_precision_disagree() -> None:
    assert not judge({k: t.bfloat16().float() for k, t in truth().items()})


def kinked(k: int, size: float, rows: Tensor) -> Rows:
    """Stand for a sample on a kink: every other perturbed run lands on the other side."""
    g = no_draw(k, size, rows)
    g["weight"] = g["weight"] * (1 + 1e-3 * (k % 2))
    return g


def test_a_sample_on_a_kink_agrees_and_is_listed() -> None:
    t = truth()
    found = Calibrated().judge(spoil(3, "weight", 1.001), t, [rounded(t)], kinked, per_sample=True)
    assert found.agrees
    assert found.ill_conditioned == (3,)


def test_many_samples_on_a_kink_disagree() -> None:
    t = truth()
    assert not Calibrated().judge(spoil(slice(0, 5), "weight", 1.001), t, [rounded(t)], kinked, per_sample=True).agrees


def test_a_sample_where_the_yardstick_is_off_too_is_listed() -> None:
    t = truth()
    both = spoil(3, "weight", 1.001)
    found = Calibrated().judge(both, t, [both], no_draw, per_sample=True)
    assert (found.agrees, found.ill_conditioned) == (True, (3,))


def test_errors_are_those_of_the_samples() -> None:
    t = truth()
    found = Calibrated().judge(spoil(3, "weight", 1.01), t, [rounded(t)], no_draw, per_sample=True)
    assert [i for i, error in found.errors if error > 1e-3] == [3]
    assert [i for i, _ in found.errors] == list(range(N))


def test_errors_of_a_choice_of_samples_have_the_batchs_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.truth.BUDGET", 0)
    problem = make_problem("logistic", "random", "nll", batch_size=40)
    referee = Referee(problem, "grads", {}, Calibrated())
    finding = referee.precision(
        get_backend("vmap").grads(problem.model, problem.loss_fn)(problem.inputs, problem.targets)
    )
    assert finding.agreement is not None
    assert referee.truth.chosen is not None
    assert [i for i, _ in finding.agreement.errors] == referee.truth.chosen.tolist()


def test_same_function_forgives_rounding_only() -> None:
    t = truth()
    rounding, logic = ({k: x * (1 + e) for k, x in t.items()} for e in (1e-14, 1e-8))
    assert Calibrated().is_same_function(rounding, t, no_draw, per_sample=True).agrees
    assert (
        not Calibrated()
        .is_same_function(logic, t, lambda k, s, r: {n: x[r] for n, x in t.items()}, per_sample=True)
        .agrees
    )


@pytest.mark.parametrize(("gap", "agrees"), [(2.9e-3, True), (3.2e-3, False)])
def test_allclose_is_a_tolerance_on_every_number(gap: float, agrees: bool) -> None:
    y = {"weight": torch.zeros(4, 3)}
    found = AllClose().judge({"weight": torch.full((4, 3), gap)}, y, [y], no_draw, per_sample=True)
    assert found.agrees is agrees


@pytest.mark.parametrize("tolerances", [{"atol": 0}, {"atol": 0, "rtol": 0}], ids=str)
@pytest.mark.parametrize(("g", "y", "agrees"), [(0, 0, True), (1, 1, True), (5e-324, 0, False), (0, 1, False)])
def test_allclose_without_an_absolute_tolerance(tolerances: dict[str, float], g: float, y: float, agrees: bool) -> None:
    """0/0 is no disagreement: what is equal is right, and beside zero nothing else is."""
    result, right = ({"weight": torch.full((4, 3), x, dtype=torch.float64)} for x in (g, y))
    assert AllClose(**tolerances).judge(result, right, [right], no_draw, per_sample=True).agrees is agrees


def test_zero_gradients_agree_with_zeros() -> None:
    zero = {"weight": torch.zeros(N, 3, dtype=torch.float64)}
    assert Calibrated().judge(rounded(zero), zero, [rounded(zero)], no_draw, per_sample=True).agrees


FORMS = {
    "renamed": ({"w": torch.zeros(2, 3)}, "parameters are renamed: `w` for `weight`"),
    "missing": ({}, "1 of 1 parameters are missing: `weight`"),
    "no samples": ({"weight": torch.zeros(3)}, "shape [3], not [2, 3] (the samples' axis is missing"),
    "transposed": ({"weight": torch.zeros(3, 2)}, "shape [3, 2], not [2, 3] (transposed)"),
    "dtype": ({"weight": torch.zeros(2, 3).double()}, "dtype float64, not float32"),
    "graph": ({"weight": torch.zeros(2, 3, requires_grad=True)}, "still owns a graph"),
    "list": ([torch.zeros(2, 3)], "the result is a list"),
    "none": ({"weight": None}, "`weight` is a NoneType"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_form_is_named(form: str) -> None:
    result, sentence = FORMS[form]
    assert sentence in (wrong_form(result, {"weight": torch.zeros(2, 3)}) or "")


def test_a_right_form_is_not_blamed() -> None:
    assert wrong_form({"weight": torch.zeros(2, 3)}, {"weight": torch.ones(2, 3)}) is None


@pytest.mark.parametrize(
    ("spoiled", "sentence"),
    [
        (lambda t: t / N, f"every gradient is 1/{N} of the truth"),
        (lambda t: t * N, f"every gradient is {N} times the truth"),
        (lambda t: 2 * t, "every gradient is 2 times the truth"),
        (lambda t: -t, "every gradient is the negative of the truth"),
        (lambda t: 0 * t, "every gradient is zero"),
        (lambda t: t.flip(0), "the samples are permuted: in reverse order"),
        (lambda t: t.roll(1, 0), "the samples are permuted: row i is sample i + 31"),
        (lambda t: t.mean(0).expand_as(t), "every sample has the same gradient, the average over the batch"),
        (lambda t: t.sum(0).expand_as(t), "every sample has the same gradient, the sum over the batch"),
        (lambda t: t[4:5].expand_as(t), "every sample has the same gradient, that of sample 4"),
    ],
)
def test_an_error_is_explained(spoiled: object, sentence: str) -> None:
    t = truth()
    assert sentence in explain({k: spoiled(x) for k, x in t.items()}, t, "grads")  # type: ignore[operator]


def test_an_error_in_one_parameter_of_some_samples_is_located() -> None:
    sentence = explain(spoil(slice(3, 5), "bias", 2.0), truth(), "grads")
    assert sentence == "only `bias` of 2 parameters: only 2 of 32 samples (3, 4): every gradient is 2 times the truth"


@pytest.fixture(scope="module")
def tutorial() -> Problem:
    return make_problem("simple_cnn", "random", "nll", batch_size=64, seed=0)


def test_the_tutorials_kink_is_ill_conditioned_not_wrong(tutorial: Problem) -> None:
    """Moved by a rounding, sample 59's gradient may land on the other side of a kink: right, and said."""
    finding = Referee(tutorial, "grads", {}, Calibrated()).precision(
        get_backend("vmap").grads(tutorial.model, tutorial.loss_fn)(tutorial.inputs, tutorial.targets)
    )
    assert finding.status == "ok"
    assert finding.agreement is not None
    assert len(finding.agreement.ill_conditioned) <= 2


def test_a_quantity_without_samples_is_one_row() -> None:
    rows = as_rows({"weight": torch.zeros(4, 3), "scale": torch.zeros(())}, "clipped_sum")
    assert {k: tuple(t.shape) for k, t in rows.items()} == {"weight": (1, 12), "scale": (1, 1)}


def test_bfloat16_is_held_to_bfloat16(tutorial: Problem) -> None:
    small = replace(tutorial, inputs=tutorial.inputs[:4], targets=tutorial.targets[:4]).to(torch.bfloat16)
    referee = Referee(small, "grads", {}, Calibrated())
    finding = referee.precision(get_backend("vmap").grads(small.model, small.loss_fn)(small.inputs, small.targets))
    assert finding.status == "ok", finding.diagnosis
