"""A disagreement, explained: given only the result and the truth, one sentence that says what is wrong.

`explain` tries explanations in order and takes the first that leaves less than a tenth of the error unexplained; what
is wrong in one parameter or in some samples only is explained there. `explain_calls` looks at several calls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from testbed.agreement import PER_SAMPLE, Rows
from testbed.form import shown, which

UNEXPLAINED = 0.1  # share of the error that an explanation may leave
EXACT = 0.05  # of that, for explanations that come close to a plain factor
SCATTER = 30.0  # rounding noise differs by less than this between samples; errors of logic are often in few
SHORT = {  # formats that a result may have been rounded to or computed in, with their unit roundoff
    "bfloat16": (torch.bfloat16, 2.0**-8),
    "TF32 or float16": (torch.float16, 2.0**-11),
    "float32": (torch.float32, 2.0**-24),
}


@dataclass(frozen=True)
class Difference:
    """A result that has the right form, and the truth.

    Attributes:
        g: The result, float64.
        t: The truth, float64.
        quantity: Of what, since it says what a row is.
        sizes: Numbers that a factor may be one over, with what they are: {"the batch size": 64}.
        others: Wrong results that are often meant instead, by what they are: {"the unclipped sum": rows}.
        dtype: The result's: numbers of a format are no explanation where all are.
    """

    g: Rows
    t: Rows
    quantity: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    others: Mapping[str, Rows] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(next(iter(self.t.values())))

    @property
    def subject(self) -> str:
        """What a sentence is about."""
        return {"grads": "every gradient", "norms": "every norm"}.get(self.quantity, "the result")

    @cached_property
    def flat(self) -> tuple[Tensor, Tensor]:
        """Result and truth with all parameters side by side: [R, all]."""
        return torch.cat(list(self.g.values()), 1), torch.cat(list(self.t.values()), 1)

    @cached_property
    def tolerance(self) -> float:
        """What an explanation may leave open, as a norm."""
        g, t = self.flat
        return UNEXPLAINED * float((g - t).norm())

    def fits(self, explained: Tensor, share: float = 1.0) -> bool:
        """Return whether `explained` [R, all] is the result, but for a share of what may be left open."""
        return bool((self.flat[0] - explained).norm() <= share * self.tolerance)

    def part(self, names: Sequence[str], rows: Tensor | slice = slice(None)) -> "Difference":
        """Return the difference in these parameters and rows."""
        g, t = ({k: some[k][rows] for k in names} for some in (self.g, self.t))
        return Difference(g, t, self.quantity, self.sizes, dtype=self.dtype)


Explanation = Callable[[Difference], str | None]


def explain(
    result: Rows,
    truth: Rows,
    quantity: str,
    sizes: Mapping[str, int] | None = None,
    others: Mapping[str, Rows] | None = None,
) -> str:
    """Return one sentence that says how a result of the right form differs from the truth.

    Args:
        result: The rows that disagree, any dtype.
        truth: The right ones, float64.
        quantity: Of what, since it says what a row is.
        sizes: Numbers that a factor may be one over, with what they are.
        others: Wrong results that are often meant instead, by what they are.
    """
    g, t = ({name: rows[name].double() for name in truth} for rows in (result, truth))
    wide = {what: {name: rows[name].double() for name in truth} for what, rows in (others or {}).items()}
    return _explain(Difference(g, t, quantity, sizes or {}, wide, next(iter(result.values())).dtype))


def explain_calls(results: Sequence[Rows], truth: Rows) -> str | None:
    """Return what is wrong with three calls on the same data: they drift, or are random; None if they are the same."""
    flat = [torch.cat([r[name].double() for name in truth], 1) for r in results]
    right = torch.cat(list(truth.values()), 1).double()
    steps = [b - a for a, b in pairwise(flat)]
    if all(step.norm() <= UNEXPLAINED * (flat[0] - right).norm() for step in steps):
        return None
    same_way = torch.nn.functional.cosine_similarity(steps[0].flatten(), steps[1].flatten(), dim=0)
    farther = [float((x - right).norm()) for x in flat]
    if same_way > 0.9 and farther == sorted(farther):
        return "drifts: every call on the same data is farther from the truth"
    return "random or changing: calls on the same data differ"


def _explain(d: Difference) -> str:
    found = next((sentence for e in EXPLANATIONS if (sentence := e(d))), None)
    return found or f"{d.subject} differs from the truth: {_worst(d)}"


def _zeros(d: Difference) -> str | None:
    return None if d.flat[0].any() or not d.flat[1].any() else f"{d.subject} is zero"


def _scaled(d: Difference) -> str | None:
    g, t = d.flat
    if not t.any():
        return None
    factor = float((g * t).sum() / (t * t).sum())
    return f"{d.subject} is {_times(factor, d.sizes)}" if d.fits(factor * t) else None


def _meant(d: Difference) -> str | None:
    flat = {what: torch.cat([rows[k] for k in d.t], 1) for what, rows in d.others.items()}
    return next((f"{d.subject} is {what}" for what, rows in flat.items() if d.fits(rows, EXACT)), None)


def _equal_rows(d: Difference) -> str | None:
    g, t = d.flat
    if d.quantity != "grads" or d.rows < 2 or not torch.allclose(g, g[:1], rtol=1e-6, atol=0):
        return None
    for what, row in (("the average over the batch", t.mean(0)), ("the sum over the batch", t.sum(0))):
        if d.fits(row.expand_as(g)):
            return f"every sample has the same gradient, {what}"
    nearest = int((t - g[:1]).norm(dim=1).argmin())
    whose = f", that of sample {nearest}" if d.fits(t[nearest].expand_as(g)) else ""
    return f"every sample has the same gradient{whose}"


def _permuted(d: Difference) -> str | None:
    g, t = d.flat
    if d.quantity not in ("grads", "norms") or d.rows < 2:
        return None
    source = torch.arange(d.rows, device=g.device)
    moved = ((g - t).norm(dim=1) > d.tolerance / d.rows**0.5).nonzero().flatten()
    source[moved] = moved[torch.cdist(g[moved], t[moved]).argmin(1)]
    shift = int(source[0]) or 1
    if d.fits(t.flip(0)):
        how = "in reverse order"
    elif d.fits(t.roll(-shift, 0)):
        how = f"row i is sample i + {shift}, round the end"
    elif len(source.unique()) == d.rows and len(moved) and d.fits(t[source]):
        how = shown([f"row {i} is sample {int(source[i])}" for i in moved])
    else:
        return None
    return f"the samples are permuted: {how}"


def _low_precision(d: Difference) -> str | None:
    """Explain errors that are spread evenly and as large as a short format's rounding."""
    g, t = d.flat
    error = float((g - t).norm() / t.norm()) if t.any() else torch.inf
    shorter = {name: (dtype, u) for name, (dtype, u) in SHORT.items() if dtype != d.dtype}
    for name, (dtype, u) in shorter.items():
        if error < 8 * u and torch.equal(g.to(dtype).double(), g) and not torch.equal(t.to(dtype).double(), t):
            return f"{d.subject} is rounded to {name}: off by {error:.1g} of the norm"
    rows = (g - t).norm(dim=1) / t.norm(dim=1).clamp_min(torch.finfo(t.dtype).tiny)
    if float(rows.max()) > SCATTER * float(rows.median()):
        return None
    for name, (_, u) in shorter.items():
        if u / 3 < error < 12 * u:
            return f"noise of about {error:.1g} of the norm in {d.subject}, as arithmetic in {name} gives"
    return None


def _row_factors(d: Difference) -> str | None:
    """Explain gradients that are scaled sample by sample, or sample by sample and parameter by parameter."""
    g, t = d.flat
    if d.quantity != "grads" or d.rows < 2:
        return None
    if d.fits((factors := _factors(g, t)) * t):
        span = f"{float(factors.min()):.3g} to {float(factors.max()):.3g}"
        return f"every sample is scaled by a factor of its own ({span}), as clipping does"
    if len(d.t) > 1 and d.fits(torch.cat([_factors(d.g[k], d.t[k]) * d.t[k] for k in d.t], 1)):
        return "every parameter of every sample is scaled by a factor of its own, as clipping per layer does"
    return None


def _some_parameters(d: Difference) -> str | None:
    errors = {k: float((d.g[k] - d.t[k]).norm()) for k in d.t}
    wrong = [k for k, error in errors.items() if error > d.tolerance / len(errors) ** 0.5]
    if not wrong or len(wrong) > len(errors) / 2:
        return None
    names = shown([f"`{k}`" for k in wrong])
    return f"only {names} of {len(errors)} parameters: {_explain(d.part(wrong))}"


def _some_samples(d: Difference) -> str | None:
    g, t = d.flat
    wrong = (g - t).norm(dim=1) > d.tolerance / d.rows**0.5
    if d.quantity not in ("grads", "norms") or not wrong.any() or int(wrong.sum()) > d.rows / 2:
        return None
    return f"only {which(wrong)}: {_explain(d.part(list(d.t), wrong.nonzero().flatten()))}"


EXPLANATIONS: tuple[Explanation, ...] = (
    _zeros,
    _meant,
    _scaled,
    _equal_rows,
    _permuted,
    _some_parameters,
    _some_samples,
    _low_precision,
    _row_factors,
)


def _factors(g: Tensor, t: Tensor) -> Tensor:
    """Return the factor [R, 1] of each row that brings `t` nearest to `g`."""
    return (g * t).sum(1, keepdim=True) / (t * t).sum(1, keepdim=True).clamp_min(torch.finfo(t.dtype).tiny)


def _times(factor: float, sizes: Mapping[str, int]) -> str:
    """Return a factor in words: "1/64 of the truth (one over the batch size)", "2 times the truth"."""
    if abs(factor + 1) < 0.01:
        return "the negative of the truth"
    for what, size in sizes.items():
        if size > 1 and abs(factor * size - 1) < 0.01:
            return f"1/{size} of the truth (one over {what})"
        if size > 1 and abs(factor / size - 1) < 0.01:
            return f"{size} times the truth ({what})"
    inverse = round(1 / factor) if 0 < factor < 1 else 0
    if inverse > 1 and abs(factor * inverse - 1) < 0.01:
        return f"1/{inverse} of the truth"
    return f"{factor:.6g} times the truth" if abs(factor - 1) > 1e-5 else f"1 {factor - 1:+.1e} times the truth"


def _worst(d: Difference) -> str:
    tiny = torch.finfo(torch.float64).tiny
    errors = {k: (d.g[k] - d.t[k]).norm(dim=1) / d.t[k].norm(dim=1).clamp_min(tiny) for k in d.t}
    name = max(errors, key=lambda k: float(errors[k].max()))
    row = int(errors[name].argmax())
    where = f"`{name}`, sample {row}" if d.quantity in PER_SAMPLE else f"`{name}`"
    if not d.t[name][row].any():
        return f"worst at {where}, which is not zero"
    return f"worst at {where}, off by {float(errors[name][row]):.2g} of its norm"
