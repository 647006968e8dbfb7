"""Every kind of error is planted, across quantities, sizes and dtypes; each is caught, and called by its name."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.agreement import PER_SAMPLE, Calibrated, Rows, as_rows
from testbed.diagnosis import explain, explain_calls
from testbed.form import nonfinite, wrong_form
from testbed.mistakes import often_meant

SHAPES = {"0.weight": (6, 5), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,), "scale": ()}
TOKENS = 12
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
ALL = ("grads", "norms", "clipped_sum", "variance", "gram")
GRADS = ("grads",)
BY_SAMPLE = ("grads", "norms")


def grads(n: int) -> Rows:
    generator = torch.Generator().manual_seed(n)
    size = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    return {
        name: torch.einsum("n,n...->n...", size, torch.randn(n, *shape, generator=generator, dtype=torch.float64))
        for name, shape in SHAPES.items()
    }


def limit_of(n: int) -> float:
    """Return a clipping threshold that clips some samples of `grads(n)` and not others."""
    return float(quantity("norms", n).median())


def quantity(name: str, n: int) -> Tensor | Rows:
    """Return a true quantity of made-up gradients, in float64, written out by its definition."""
    g = grads(n)
    flat = torch.cat([t.reshape(n, -1) for t in g.values()], 1)
    norms = flat.norm(dim=1)
    if name == "grads":
        return g
    if name == "norms":
        return norms
    if name == "clipped_sum":
        factors = (limit_of(n) / norms).clamp(max=1)
        return {k: sum(f * x for f, x in zip(factors, t, strict=True)) for k, t in g.items()}  # type: ignore[misc]
    if name == "variance":
        return {k: (t - t.mean(0)).square().mean(0) for k, t in g.items()}
    return flat @ flat.T


@dataclass(frozen=True)
class Kind:
    """A kind of error.

    Attributes:
        spoil: Rows of the truth -> rows of the result.
        name: What the sentence must contain, given n.
        quantities: Where it can happen.
        smallest: The smallest n at which it is what it is.
    """

    spoil: Callable[[Rows], Rows]
    name: Callable[[int], str]
    quantities: tuple[str, ...] = ALL
    smallest: int = 1


def each(function: Callable[[Tensor], Tensor]) -> Callable[[Rows], Rows]:
    return lambda rows: {name: function(t) for name, t in rows.items()}


def first_parameter(function: Callable[[Tensor], Tensor]) -> Callable[[Rows], Rows]:
    return lambda rows: {name: function(t) if i == 0 else t for i, (name, t) in enumerate(rows.items())}


def one_sample(function: Callable[[Tensor], Tensor]) -> Callable[[Rows], Rows]:
    return each(lambda t: torch.cat([t[:1], function(t[1:2]), t[2:]]))


def by_row(rows: Rows) -> Rows:
    return {k: t * torch.linspace(0.2, 1, len(t), dtype=t.dtype)[:, None] for k, t in rows.items()}


def by_row_and_parameter(rows: Rows) -> Rows:
    factors = torch.linspace(0.2, 1, len(rows) * len(next(iter(rows.values()))), dtype=torch.float64).view(
        len(rows), -1
    )
    return {k: t * factors[i][:, None] for i, (k, t) in enumerate(rows.items())}


def swap(t: Tensor) -> Tensor:
    return t[[1, 0, *range(2, len(t))]]


def noise(size: float) -> Callable[[Tensor], Tensor]:
    """Return the function that adds relative noise, as the arithmetic of a short format does."""
    generator = torch.Generator().manual_seed(1)
    return lambda t: t * (1 + size * torch.randn(t.shape, generator=generator, dtype=t.dtype))


KINDS = {
    "one over N": Kind(each(lambda t: t / len(t)), lambda n: f"is 1/{n} of the truth (one over the batch size)", BY_SAMPLE, 2),
    "N times": Kind(each(lambda t: t * len(t)), lambda n: f"is {n} times the truth (the batch size)", BY_SAMPLE, 2),
    "one over tokens": Kind(each(lambda t: t / TOKENS), lambda n: f"is 1/{TOKENS} of the truth (one over the number of tokens)"),
    "twice": Kind(each(lambda t: 2 * t), lambda n: "times the truth"),
    "wrong sign": Kind(each(lambda t: -t), lambda n: "is the negative of the truth"),
    "zeros": Kind(each(torch.zeros_like), lambda n: "is zero"),
    "averaged": Kind(each(lambda t: t.mean(0).expand_as(t)), lambda n: "same gradient, the average over the batch", GRADS, 2),
    "summed": Kind(each(lambda t: t.sum(0).expand_as(t)), lambda n: "same gradient, the sum over the batch", GRADS, 2),
    "one row": Kind(each(lambda t: t[1:2].expand_as(t)), lambda n: "same gradient, that of sample 1", GRADS, 3),
    "reversed": Kind(each(lambda t: t.flip(0)), lambda n: "the samples are permuted: in reverse order", BY_SAMPLE, 2),
    "rotated": Kind(each(lambda t: t.roll(-1, 0)), lambda n: "permuted: row i is sample i + 1, round the end", BY_SAMPLE, 3),
    "two swapped": Kind(each(swap), lambda n: "permuted: row 0 is sample 1, row 1 is sample 0", BY_SAMPLE, 3),
    "one parameter": Kind(first_parameter(lambda t: 3 * t), lambda n: "only `0.weight` of 5 parameters: ", GRADS),
    "one parameter's zeros": Kind(first_parameter(lambda t: 0 * t), lambda n: "parameters: every gradient is zero", GRADS),
    "one sample": Kind(one_sample(lambda t: 3 * t), lambda n: f"only 1 of {n} samples (1): ", BY_SAMPLE, 3),
    "one sample's zeros": Kind(one_sample(lambda t: 0 * t), lambda n: "samples (1): every ", BY_SAMPLE, 3),
    "clipped": Kind(by_row, lambda n: "scaled by a factor of its own (0.2 to 1), as clipping does", GRADS, 3),
    "clipped per layer": Kind(by_row_and_parameter, lambda n: "as clipping per layer does", GRADS, 3),
}  # fmt: skip


def grid() -> list[tuple[str, str, int]]:
    return [
        (k, q, n)
        for k, kind in KINDS.items()
        for q in kind.quantities
        for n in (1, 2, 3, 8, 64)
        if n >= max(kind.smallest, 2 if q == "variance" else 1)
    ]


def caught(result: Rows, truth: Rows, dtype: torch.dtype, name: str) -> bool:
    """Return whether the default rule, asked as the referee asks it, finds that the result is wrong."""

    def draw(k: int, size: float, rows: Tensor) -> Rows:
        return {key: t[rows].to(dtype) for key, t in truth.items()}

    yardstick = {key: t.to(dtype) for key, t in truth.items()}
    return not Calibrated().judge(result, truth, [yardstick], draw, per_sample=name in PER_SAMPLE).agrees


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "name", "n"), grid())
def test_planted_kind_is_caught_and_named(kind: str, name: str, n: int, dtype: torch.dtype) -> None:
    truth = as_rows(quantity(name, n), name)
    result = {k: t.to(dtype) for k, t in KINDS[kind].spoil(truth).items()}
    sentence = explain(result, truth, name, {"the batch size": n, "the number of tokens": TOKENS})
    assert caught(result, truth, dtype, name)
    assert KINDS[kind].name(n) in sentence


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [3, 16])
@pytest.mark.parametrize("name", ["norms", "clipped_sum", "variance", "gram"])
def test_what_people_often_mean_instead_is_caught_and_named(name: str, n: int, dtype: torch.dtype) -> None:
    truth = as_rows(quantity(name, n), name)
    others = {w: as_rows(r, name) for w, r in often_meant(name, {"max_norm": limit_of(n)}, grads(n)).items()}
    assert others
    for what, wrong in others.items():
        result = {k: t.to(dtype) for k, t in wrong.items()}
        assert caught(result, truth, dtype, name), what
        assert explain(result, truth, name, {}, others).endswith(f" is {what}")


@pytest.mark.parametrize(
    ("size", "sentence"),
    [(2.0**-8, "bfloat16"), (2.0**-11, "TF32 or float16"), (2.0**-23, "float32")],
    ids=["bf16", "tf32", "f32"],
)
@pytest.mark.parametrize("n", [4, 64])
@pytest.mark.parametrize("name", BY_SAMPLE)
def test_noise_of_a_lower_precision_is_named(name: str, n: int, size: float, sentence: str) -> None:
    truth = as_rows(quantity(name, n), name)
    result = each(noise(size))(truth)
    assert caught(result, truth, torch.float64, name)
    assert f"as arithmetic in {sentence} gives" in explain(result, truth, name)


@pytest.mark.parametrize(("dtype", "sentence"), [(torch.bfloat16, "bfloat16"), (torch.float16, "TF32 or float16")])
def test_rounded_numbers_are_recognised(dtype: torch.dtype, sentence: str) -> None:
    truth = as_rows(grads(8), "grads")
    assert f"is rounded to {sentence}" in explain({k: t.to(dtype).float() for k, t in truth.items()}, truth, "grads")


def test_calls_that_drift_or_are_random_are_named() -> None:
    truth = as_rows(grads(4), "grads")
    steady = [each(lambda t: 2 * t)(truth)] * 3
    drifting = [each(lambda t, k=k: t * (1 + 0.1 * k))(truth) for k in (1, 2, 3)]
    noisy = each(noise(0.1))
    random = [noisy(truth) for _ in range(3)]
    assert explain_calls(steady, truth) is None
    assert "drifts" in (explain_calls(drifting, truth) or "")
    flipping = [each(lambda t, k=k: t * (1 + 0.1 * (-1) ** k))(truth) for k in (1, 2, 3)]
    for unsteady in (random, flipping):
        assert "random or changing" in (explain_calls(unsteady, truth) or "")


def test_nan_and_infinity_are_located() -> None:
    truth = as_rows(grads(4), "grads")
    for bad in (torch.nan, torch.inf):
        result = {k: t.clone() for k, t in truth.items()}
        result["2.bias"][1, 0] = bad
        assert nonfinite(result, truth) == "nonfinite numbers in `2.bias`, 1 of 4 samples (1)"
    assert nonfinite(truth, truth) is None


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda g: {k: t for k, t in g.items() if k != "scale"}, "1 of 5 parameters are missing: `scale`"),
        (lambda g: {**g, "more": g["scale"]}, "there are extra parameters: `more`"),
        (lambda g: {k.replace("0.", "first."): t for k, t in g.items()}, "renamed: `first.weight` for `0.weight`"),
        (lambda g: {k: t.mT if k == "0.weight" else t for k, t in g.items()}, "`0.weight` has shape [4, 5, 6], not [4, 6, 5] (transposed)"),
        (lambda g: {k: t.sum(0) for k, t in g.items()}, "the samples' axis is missing"),
        (lambda g: {k: t.reshape(4, -1) for k, t in g.items()}, "`0.weight` has shape [4, 30], not [4, 6, 5]"),
        (lambda g: {k: t.half() for k, t in g.items()}, "has dtype float16, not float64"),
    ],
)  # fmt: skip
def test_a_wrong_form_is_named(spoil: Callable[[Rows], Rows], sentence: str) -> None:
    assert sentence in (wrong_form(spoil(grads(4)), grads(4)) or "")


@settings(max_examples=100, deadline=None)
@given(
    factor=st.floats(1e-3, 1e3).filter(lambda f: abs(f - 1) > 0.05),
    n=st.integers(1, 20),
    name=st.sampled_from(ALL),
)
def test_any_factor_is_measured(factor: float, n: int, name: str) -> None:
    truth = as_rows(quantity(name, n), name)
    if not any(t.any() for t in truth.values()):  # the variance of one sample
        return
    sentence = explain(each(lambda t: factor * t)(truth), truth, name)
    words = sentence.split(" is ")[1].split()[0]
    found = 1 / float(words[2:]) if words.startswith("1/") else float(words)
    assert found == pytest.approx(factor, rel=0.011)  # 1/64 is said of what is within 1 % of it


@settings(max_examples=100, deadline=None)
@given(n=st.integers(2, 12), data=st.data())
def test_any_permutation_is_recognised(n: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(n)).filter(lambda p: p != list(range(n))))
    truth = as_rows(grads(n), "grads")
    assert "the samples are permuted" in explain({k: t[list(order)] for k, t in truth.items()}, truth, "grads")


def test_numbers_of_the_runs_own_format_explain_nothing() -> None:
    truth = {"p": torch.randn(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    assert "float32" not in explain({"p": truth["p"].float()}, truth, "grads")
    assert "is rounded to float32" in explain({"p": truth["p"].float().double()}, truth, "grads")
