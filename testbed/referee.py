"""The referee of one problem and quantity: says whether a result agrees with the truth, and if not why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from backends import get_backend, reference
from testbed.agreement import PER_SAMPLE, Agreement, Calibrated, Result, Rows, Rule, as_rows
from testbed.diagnosis import explain, explain_calls
from testbed.form import hidden, nonfinite, not_finite, wrong_form
from testbed.mistakes import often_meant
from testbed.problems import Problem
from testbed.processes.store import Store
from testbed.samples import batch_of, sizes
from testbed.truth import FEW, Truth

Again: TypeAlias = Callable[[], Any]
"""The same call once more."""


@dataclass(frozen=True)
class Finding:
    """What the referee says of a result.

    Attributes:
        status: "ok", "disagrees" or "nonfinite".
        diagnosis: What is wrong, in one sentence; empty where nothing is.
        agreement: The numbers behind it; None where the result has not the form to be compared.
    """

    status: str
    diagnosis: str = ""
    agreement: Agreement | None = None


class Referee:
    """Asks both questions of results: of one quantity, on a problem's batch or on its fresh one.

    Attributes:
        truth: What is right.
        rule: When a result agrees.
    """

    def __init__(
        self,
        problem: Problem,
        quantity: str,
        options: Mapping[str, Any],
        rule: Rule,
        few: int = FEW,
        autocast: str | None = None,
        store: Store | None = None,
    ) -> None:
        self.truth = Truth(problem, quantity, options, few, autocast, store)
        self.quantity, self.options, self.rule = quantity, dict(options), rule

    def same_function(self, result: object, again: Again | None = None) -> Finding:
        """Ask question 1 of a float64 result on `few`; `again` repeats the call, to explain a disagreement."""
        truth, few = self.truth.exact_of_few(), self.truth.few
        rule = self.rule if isinstance(self.rule, Calibrated) else Calibrated()
        draw = self.truth.draws_of_few()
        per_sample = self.quantity in PER_SAMPLE

        def judge(rows: Rows, right: Rows) -> Agreement:
            return rule.is_same_function(rows, right, draw, per_sample=per_sample)

        return self._find(result, truth, truth, judge, few, again)

    def precision(self, result: object, again: Again | None = None, *, fresh: bool = False) -> Finding:
        """Ask question 2 of a result in the run's dtype; `again` repeats the call, to explain a disagreement."""
        yardsticks = [as_rows(y, self.quantity) for y in self.truth.runs(fresh=fresh)]
        draw = self.truth.draws(fresh=fresh)
        per_sample = self.quantity in PER_SAMPLE

        def judge(rows: Rows, right: Rows) -> Agreement:
            return self.rule.judge(rows, right, yardsticks, draw, per_sample=per_sample, u=self.truth.u)

        if self.truth.chosen is not None and (wrong := wrong_form(result, self._whole(fresh))):
            return Finding("disagrees", wrong)
        pick = self._pick if self.truth.chosen is not None else None
        form = self.truth.yardsticks(fresh=fresh)[0]
        found = self._find(result, self.truth.exact(fresh=fresh), form, judge, self.truth.wide, again, fresh, pick)
        return replace(found, agreement=self._in_batch(found.agreement))

    def share(self, *, fresh: bool) -> None:
        """Compute what `same_function` and `precision` ask for, where others take it from the store."""
        self.truth.share(fresh=fresh, few=not fresh and self.rule.same_function)

    def _whole(self, fresh: bool) -> Result:
        """Return what has the form of the whole batch's result; it takes no memory."""
        some = self.truth.yardsticks(fresh=fresh)[0]
        if isinstance(some, Tensor):
            return some[:1].expand(self.truth.n, *some.shape[1:])
        return {name: t[:1].expand(self.truth.n, *t.shape[1:]) for name, t in some.items()}

    def _pick(self, result: Result) -> Result:
        """Return the samples of a result that are checked."""
        if isinstance(result, Tensor):
            return result[self.truth.chosen]
        return {name: t[self.truth.chosen] for name, t in result.items()}

    def _in_batch(self, agreement: Agreement | None) -> Agreement | None:
        """Return the agreement with the indices that samples have in the whole batch."""
        if agreement is None or self.truth.chosen is None:
            return agreement
        index: list[int] = self.truth.chosen.tolist()
        sample = None if agreement.sample is None else index[agreement.sample]
        ill = tuple(sorted(index[i] for i in agreement.ill_conditioned))
        errors = tuple((index[i], error) for i, error in agreement.errors)
        return replace(agreement, sample=sample, ill_conditioned=ill, errors=errors)

    def _find(
        self,
        result: Any,  # noqa: ANN401  a backend may return anything
        truth: Result,
        form: Result,
        judge: Callable[[Rows, Rows], Agreement],
        problem: Problem,
        again: Again | None,
        fresh: bool = False,
        pick: Callable[[Result], Result] | None = None,
    ) -> Finding:
        result = pick(result) if pick else result
        if wrong := wrong_form(result, form):
            return Finding("disagrees", wrong)
        rows, right = as_rows(result, self.quantity), as_rows(truth, self.quantity)
        if bad := nonfinite(rows, right):
            return Finding("nonfinite", bad)
        if lost := hidden(rows, right):
            return Finding("disagrees", lost)
        agreement = replace(judge(rows, right), nonfinite=not_finite(right))
        if agreement.agrees:
            return Finding("ok", agreement=agreement)
        rows, right = finite_parts(rows), finite_parts(right)
        if again:
            repeated = [finite_parts(as_rows(pick(again()) if pick else again(), self.quantity)) for _ in range(2)]
            if unsteady := explain_calls([rows, *repeated], right):
                return Finding("disagrees", unsteady, agreement)
        others = self._often_meant(problem, fresh)
        return Finding("disagrees", explain(rows, right, self.quantity, sizes(problem), others), agreement)

    def _often_meant(self, problem: Problem, fresh: bool) -> dict[str, Rows]:
        """Return what else people compute under the quantity's name, to recognise it."""
        if self.quantity == "grads":
            return {}
        fn = get_backend(reference()).grads(problem.model, problem.loss_fn)
        found = often_meant(self.quantity, self.options, fn(*batch_of(problem, fresh)))
        return {what: as_rows(other, self.quantity) for what, other in found.items()}


def finite_parts(rows: Rows) -> Rows:
    """Return rows with zero in place of what is not finite, which no explanation is about."""
    return {name: t.nan_to_num(0, 0, 0) for name, t in rows.items()}
