"""Does a result agree with the truth? Two questions: is it the same function, and how precise is it.

1. The same function? Candidate and truth are both float64; any difference beyond rounding is an error of logic.
2. How precise? The candidate in the run's dtype is held against the float64 truth t, beside the yardstick y: the
   reference in that same dtype, with unit roundoff u. Per sample i and parameter p,

       stage 1:  ‖g−t‖(i,p) ≤ c · base(i,p),   base = max(‖y−t‖(i,p), u·‖t(i,p)‖, u/16·‖t(i)‖)
       stage 2:  ‖g−t‖(i,p) ≤ c · max(base, cloud)(i,p),   for the few samples that fail stage 1

   `cloud` is the largest distance from the truth of K reference runs at inputs and parameters moved by a few
   roundings. Near a kink (ReLU, max-pool) it is large, and a result that lands on the other side is right: such a
   sample is ill-conditioned. More than max(4, N/8) of them are a disagreement; in half precision max(4, N/2).

Nothing here knows backends or YAML: results and truths are tensors, the cloud is a function that draws.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from backends.registry import Registry

Result: TypeAlias = Tensor | Mapping[str, Tensor]
"""What a quantity is: one tensor, or one for each parameter."""

Rows: TypeAlias = dict[str, Tensor]
"""A result as {name: [R, numbers]}: R is N where the result has samples, else 1."""

Runs: TypeAlias = Sequence[Rows]
"""The reference's rows in the run's dtype, once or more: kernels may be nondeterministic."""

Draw: TypeAlias = Callable[[int, float, Tensor], Rows]
"""(k, relative size of the perturbation, rows wanted) -> the reference's rows for them at perturbed inputs."""

Cloud: TypeAlias = Callable[[int, Tensor], Tensor]
"""(k, rows) -> ‖y_k − t‖ [rows, P] of the k-th perturbed run."""

SIZES = (1.0, 2.0, 4.0, 8.0, 16.0)  # perturbations in roundings; wider than one, since one alone gave false alarms
FLOAT64_SLACK = (
    2.0**20
)  # roundings that an ill-conditioned but right float64 gradient may lose; logic errors are larger
COARSE = 2.0**-16  # unit roundoff above which a dtype counts as half precision
OUTLIER = 64.0  # times the typical sample's error: far above scatter, far below what a kink does
CHUNK = 2**20  # numbers held in float64 at a time while two results are compared
TINY = torch.finfo(torch.float64).tiny  # 0 / TINY is 0: no error where none is allowed is agreement
PER_SAMPLE = ("grads", "norms", "gram")  # quantities whose first axis is the sample


@dataclass(frozen=True)
class Agreement:
    """What was found.

    Attributes:
        agrees: The answer.
        question: What decided: "same function", "precision" or "allclose".
        error: The largest relative error ‖g−t‖(i,p) / ‖t(i)‖ over samples and parameters.
        excess: The largest error in units of what is allowed; above 1 only where the result disagrees.
        parameter: The parameter with the largest excess.
        sample: Its sample, or None where the quantity has no samples.
        ill_conditioned: Samples that only the cloud excuses, or that the reference is as far off on.
        errors: (sample, ‖g−t‖(i) / ‖t(i)‖) of each sample that was checked, where the question is how precise it is and
            the quantity has samples.
        nonfinite: Where the truth itself is NaN or infinite, in words; there is nothing to compare there.
    """

    agrees: bool
    question: str
    error: float
    excess: float
    parameter: str
    sample: int | None
    ill_conditioned: tuple[int, ...] = ()
    errors: tuple[tuple[int, float], ...] = ()
    nonfinite: str = ""


def as_rows(result: Result, quantity: str) -> Rows:
    """Return a result of any quantity as rows: samples where it has them, else one row."""
    named = {quantity: result} if isinstance(result, Tensor) else dict(result)
    count = None if quantity in PER_SAMPLE else 1
    return {name: t.detach().reshape(count or len(t), -1) for name, t in named.items()}


RULES: Registry[type["Rule"]] = Registry("agreement rule")


@dataclass(frozen=True)
class Rule(ABC):
    """A rule that says whether a result agrees; its fields are its options."""

    same_function: ClassVar[bool] = True  # whether question 1 is asked too

    @abstractmethod
    def judge(
        self, result: Rows, truth: Rows, yardsticks: Runs, draw: Draw, *, per_sample: bool, u: float | None = None
    ) -> Agreement:
        """Hold a result in the run's dtype against the float64 truth and runs of the reference in that dtype.

        Args:
            result: What is judged.
            truth: In float64.
            yardsticks: The reference in the same arithmetic.
            draw: Draws perturbed runs of the reference.
            per_sample: Whether rows are samples.
            u: The arithmetic's unit roundoff, where it is coarser than the yardsticks' dtype (autocast, TF32).
        """


@RULES.register("calibrated")
@dataclass(frozen=True)
class Calibrated(Rule):
    """Question 1 in float64, then question 2 in the run's dtype, with a cloud of perturbed runs for kinks.

    The defaults come from `python -m testbed calibrate` (`experiments/results/calibration-cpu`): a factor of 2 cries
    wolf on 30 % of right float32 results, 3 on none of 3800; trained SimpleCNNs need 10 draws at 3 and 5 at 4.

    Options:
        factor: c, how much farther than the yardstick a result may be from the truth.
        draws: K, how many perturbed reference runs make the cloud.
    """

    factor: Annotated[float, Field(gt=0)] = 4.0
    draws: Annotated[int, Field(ge=0)] = 20

    def judge(
        self, result: Rows, truth: Rows, yardsticks: Runs, draw: Draw, *, per_sample: bool, u: float | None = None
    ) -> Agreement:
        """Answer question 2: is the result as near the float64 truth as its arithmetic allows?"""
        u = u or unit_roundoff(yardsticks[0])
        base = precision_base(truth, yardsticks, u)
        most = most_excused(len(base), u)
        found = self._judge("precision", result, truth, base, cloud(truth, draw, u), most, per_sample)
        if not (found.agrees and per_sample):
            return found
        return replace(found, ill_conditioned=tuple(sorted({*found.ill_conditioned, *_outliers(base, truth, u)})))

    def is_same_function(self, result: Rows, truth: Rows, draw: Draw, *, per_sample: bool) -> Agreement:
        """Answer question 1: do two float64 results differ by no more than float64 rounding?"""
        u = unit_roundoff(truth)
        base = same_function_base(truth)
        most = most_excused(len(base), u)
        return self._judge("same function", result, truth, base, cloud(truth, draw, u), most, per_sample)

    def decide(self, error: Tensor, base: Tensor, distances: Cloud, most: int) -> tuple[Tensor, tuple[int, ...]]:
        """Return the excess [R, P], above 1 where the result disagrees, and the rows that only the cloud excuses.

        Args:
            error: ‖g−t‖(i,p).
            base: What stage 1 allows, but for the factor.
            distances: The cloud.
            most: How many rows the cloud may excuse; see `most_excused`.
        """
        excess = error / (self.factor * base).clamp_min(TINY)
        failing = (~(excess <= 1)).any(1).nonzero().flatten()  # NaN fails
        if not len(failing) or len(failing) > most:
            return excess, ()
        allowed = base[failing]
        for k in range(self.draws):
            allowed = torch.maximum(allowed, distances(k, failing))
        excess[failing] = error[failing] / (self.factor * allowed).clamp_min(TINY)
        return excess, tuple(int(i) for i in failing if excess[i].max() <= 1)

    def _judge(
        self, question: str, result: Rows, truth: Rows, base: Tensor, distances: Cloud, most: int, per_sample: bool
    ) -> Agreement:
        error = distance(result, truth)
        excess, excused = self.decide(error, base, distances, most)
        return _answer(question, excess, error, truth, excused if per_sample else (), per_sample)


@RULES.register("allclose")
@dataclass(frozen=True)
class AllClose(Rule):
    """The tutorial's rule, |g − y| ≤ atol + rtol·|y| for every number; y is the reference in the run's dtype.

    Options:
        atol: Absolute tolerance.
        rtol: Relative tolerance.
    """

    same_function: ClassVar[bool] = False

    atol: Annotated[float, Field(ge=0)] = 3e-3
    rtol: Annotated[float, Field(ge=0)] = 1e-5

    def judge(
        self, result: Rows, truth: Rows, yardsticks: Runs, draw: Draw, *, per_sample: bool, u: float | None = None
    ) -> Agreement:
        """Compare every number with the yardstick's; see `torch.allclose`."""
        y = {name: t.double() for name, t in yardsticks[0].items()}
        worst = [self._excess(result[name].double(), t).amax(1) for name, t in y.items()]
        excess = torch.stack(worst, 1).where(norms(truth).isfinite(), 0)
        return _answer("allclose", excess, distance(result, truth), truth, (), per_sample)

    def _excess(self, g: Tensor, y: Tensor) -> Tensor:
        """Return |g − y| in units of what is allowed; what is equal is right where nothing is."""
        gap = (g - y).abs()
        return (gap / (self.atol + self.rtol * y.abs())).where(gap != 0, 0)


def cloud(truth: Rows, draw: Draw, u: float) -> Cloud:
    """Return the distances from the truth of reference runs that are perturbed by a few roundings u."""

    def distances(k: int, rows: Tensor) -> Tensor:
        return distance(draw(k, SIZES[k % len(SIZES)] * u, rows), {name: t[rows] for name, t in truth.items()})

    return distances


def most_excused(n: int, u: float) -> int:
    """Return how many of n samples may be excused by a kink: an eighth, half of them in half precision; four always.

    The coarser the dtype, the more samples have a kink within a few roundings: half precision with an eighth gave 3
    false alarms in 1286 results (`python -m testbed calibrate`). It cannot see small errors anyway; question 1 does.
    """
    return max(4, n // 2 if u > COARSE else n // 8)


def precision_base(truth: Rows, yardsticks: Runs, u: float | None = None) -> Tensor:
    """Return max(‖y−t‖(i,p), u·‖t(i,p)‖, u/16·‖t(i)‖) [R, P]; of several yardsticks the farthest counts."""
    base = _roundings(truth, u or unit_roundoff(yardsticks[0]))
    for yardstick in yardsticks:
        base = torch.maximum(base, distance(yardstick, truth))
    return base


def same_function_base(truth: Rows) -> Tensor:
    """Return what float64 rounding alone may do [R, P]."""
    return FLOAT64_SLACK * _roundings(truth, unit_roundoff(truth))


def _roundings(truth: Rows, u: float) -> Tensor:
    """Return max(u·‖t(i,p)‖, u/16·‖t(i)‖) [R, P]: what nobody can be blamed for."""
    size = _sizes(truth)
    return u * torch.maximum(size, _over_parameters(size) / 16)


def _outliers(base: Tensor, truth: Rows, u: float) -> list[int]:
    """Return the samples that the yardstick itself is far off on, in roundings, compared with the typical sample."""
    roundings = (base / _roundings(truth, u).clamp_min(TINY)).amax(1)
    return [int(i) for i in (roundings > OUTLIER * roundings.median()).nonzero().flatten()]


def unit_roundoff(rows: Rows) -> float:
    """Return u of the rows' dtype: half the gap between 1 and the next number."""
    return torch.finfo(next(iter(rows.values())).dtype).eps / 2


def _answer(
    question: str, excess: Tensor, error: Tensor, truth: Rows, excused: tuple[int, ...], per_sample: bool
) -> Agreement:
    """Return the answer from error and excess [R, P]; a NaN in the excess is a disagreement."""
    row, column = divmod(int(excess.nan_to_num(nan=torch.inf).argmax()), excess.shape[1])
    relative = error / _over_parameters(_sizes(truth)).clamp_min(TINY)
    shown = per_sample and question != "same function"  # that one is about logic
    samples = enumerate(relative.norm(dim=1).tolist()) if shown else ()
    return Agreement(
        agrees=bool((excess <= 1).all()),
        question=question,
        error=float(relative.max()),
        excess=float(excess[row, column]),
        parameter=list(truth)[column],
        sample=row if per_sample else None,
        ill_conditioned=excused,
        errors=tuple((i, float(f"{e:.3g}")) for i, e in samples),  # a record has to hold them
    )


def norms(rows: Rows) -> Tensor:
    """Return ‖t(i,p)‖ [R, P] in float64, a few rows at a time; it is finite just where all numbers of the row are."""
    columns = []
    for t in rows.values():
        parts = t.split(max(1, CHUNK // max(1, t.shape[1])))  # torch makes a float64 copy of what it is given
        columns.append(torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in parts]))
    return torch.stack(columns, 1)


def distance(result: Rows, truth: Rows) -> Tensor:
    """Return ‖g−t‖(i,p) [R, P] in float64, zero where the truth is not finite: there is nothing to compare.

    It goes a few rows at a time: fresh memory costs more than the arithmetic.
    """
    columns = []
    for name, t in truth.items():
        step = max(1, CHUNK // max(1, t.shape[1]))
        parts = zip(result[name].split(step), t.split(step), strict=True)
        columns.append(torch.cat([torch.linalg.vector_norm(a.double() - b.double(), dim=1) for a, b in parts]))
    found = torch.stack(columns, 1)
    return found if found.isfinite().all() else found.where(norms(truth).isfinite(), 0)


def _sizes(truth: Rows) -> Tensor:
    """Return ‖t(i,p)‖ [R, P], zero where it is not finite."""
    return norms(truth).nan_to_num(0, 0, 0)


def _over_parameters(norms: Tensor) -> Tensor:
    """Return ‖t(i)‖ [R, 1] of ‖t(i,p)‖ [R, P]."""
    over: Tensor = torch.linalg.vector_norm(norms, dim=1, keepdim=True)
    return over
