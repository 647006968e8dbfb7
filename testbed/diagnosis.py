"""A disagreement, explained: given only the result and the truth, one sentence that says what is wrong.

`wrong_form` looks at names and shapes, `nonfinite` for NaN and infinity, `explain` at the numbers: it tries the
explanations in order and takes the first that leaves less than a tenth of the error unexplained.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from testbed.agreement import PER_SAMPLE, Result, Rows, norms

SHOWN = 3  # names or rows in a sentence
UNEXPLAINED = 0.1  # share of the error that an explanation may leave


def wrong_form(result: object, truth: Result) -> str | None:
    """Return what is wrong with the form of a result: its type, names, shapes or graph; None if nothing is.

    Args:
        result: What a backend returned.
        truth: What has the right form.
    """
    if isinstance(truth, Tensor):
        if not isinstance(result, Tensor):
            return f"the result is a {type(result).__name__}, not a tensor {list(truth.shape)}"
        return _wrong_tensor("the result", result, truth)
    if not isinstance(result, Mapping):
        return f"the result is a {type(result).__name__}, not {{parameter name: tensor}}"
    missing, extra = [n for n in truth if n not in result], [n for n in result if n not in truth]
    if missing and len(missing) == len(extra):
        pairs = _shown([f"`{a}` for `{b}`" for a, b in zip(extra, missing, strict=True)])
        return f"parameters are renamed: {pairs}"
    if missing:
        return f"{len(missing)} of {len(truth)} parameters are missing: {_shown([f'`{n}`' for n in missing])}"
    if extra:
        return f"there are extra parameters: {_shown([f'`{n}`' for n in extra])}"
    wrong = [_wrong_tensor(f"`{name}`", result[name], t) for name, t in truth.items()]
    return next((w for w in wrong if w), None)


def _wrong_tensor(what: str, found: object, truth: Tensor) -> str | None:
    if not isinstance(found, Tensor):
        return f"{what} is a {type(found).__name__}, not a tensor"
    if found.shape != truth.shape:
        why = ""
        if found.dim() == truth.dim() and sorted(found.shape) == sorted(truth.shape):
            why = " (transposed)"
        elif tuple(found.shape) == tuple(truth.shape[1:]):
            why = " (the samples' axis is missing: summed or averaged over the batch)"
        return f"{what} has shape {list(found.shape)}, not {list(truth.shape)}{why}"
    if found.dtype != truth.dtype:
        return f"{what} has dtype {_dtype(found)}, not {_dtype(truth)}"
    if found.requires_grad:
        return f"{what} still owns a graph; results are detached"
    if found.device != truth.device:
        return f"{what} is on {found.device}, the model on {truth.device}"
    return None


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def nonfinite(result: Rows, truth: Rows) -> str | None:
    """Return where a result is NaN or infinite though the truth is not; None where it is finite."""
    if norms(result).isfinite().all():  # cheaper than looking at every number
        return None
    bad = {name: ~t.isfinite() & truth[name].isfinite() for name, t in result.items()}
    names = [f"`{name}`" for name, b in bad.items() if b.any()]
    if not names:
        return None
    rows = torch.stack([b.any(1) for b in bad.values()]).any(0)
    return f"nonfinite numbers in {_shown(names)}, {_which(rows)}"


@dataclass(frozen=True)
class Difference:
    """A result that has the right form, and the truth.

    Attributes:
        g: The result, float64.
        t: The truth, float64.
        quantity: Of what, since it says what a row is.
    """

    g: Rows
    t: Rows
    quantity: str

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

    def fits(self, explained: Tensor) -> bool:
        """Return whether `explained` [R, all] is the result, but for a small share of the error."""
        return bool((self.flat[0] - explained).norm() <= self.tolerance)

    def only(self, names: Sequence[str]) -> "Difference":
        """Return the difference in these parameters."""
        return Difference({k: self.g[k] for k in names}, {k: self.t[k] for k in names}, self.quantity)

    def at(self, rows: Tensor) -> "Difference":
        """Return the difference in these rows."""
        g, t = ({k: x[rows] for k, x in some.items()} for some in (self.g, self.t))
        return Difference(g, t, self.quantity)


Explanation = Callable[[Difference], str | None]


def explain(result: Rows, truth: Rows, quantity: str) -> str:
    """Return one sentence that says how a result of the right form differs from the truth.

    Args:
        result: The rows that disagree, any dtype.
        truth: The right ones, float64.
        quantity: Of what, since it says what a row is.
    """
    g, t = ({name: rows[name].double() for name in truth} for rows in (result, truth))
    return _explain(Difference(g, t, quantity))


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
    if not d.fits(factor * t):
        return None
    return f"{d.subject} is {_times(factor, d.rows if d.quantity in PER_SAMPLE else None)} the truth"


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
    source = torch.cdist(g, t).argmin(1)
    here = torch.arange(d.rows, device=source.device)
    if len(source.unique()) != d.rows or torch.equal(source, here) or not d.fits(t[source]):
        return None
    shifts = ((source - here) % d.rows).unique()
    if torch.equal(source, here.flip(0)):
        how = "in reverse order"
    elif len(shifts) == 1:
        how = f"row i is sample i + {int(shifts)}, round the end"
    else:
        how = _shown([f"row {i} is sample {int(source[i])}" for i in (source != here).nonzero().flatten()])
    return f"the samples are permuted: {how}"


def _one_parameter(d: Difference) -> str | None:
    errors = {k: float((d.g[k] - d.t[k]).norm()) for k in d.t}
    wrong = [k for k, error in errors.items() if error > d.tolerance / len(errors) ** 0.5]
    if not wrong or len(wrong) > len(errors) / 2:
        return None
    names = _shown([f"`{k}`" for k in wrong])
    return f"only {names} of {len(errors)} parameters: {_explain(d.only(wrong))}"


def _some_samples(d: Difference) -> str | None:
    g, t = d.flat
    wrong = (g - t).norm(dim=1) > d.tolerance / d.rows**0.5
    if d.quantity not in ("grads", "norms") or not wrong.any() or int(wrong.sum()) > d.rows / 2:
        return None
    return f"only {_which(wrong)}: {_explain(d.at(wrong.nonzero().flatten()))}"


EXPLANATIONS: tuple[Explanation, ...] = (_zeros, _scaled, _equal_rows, _permuted, _one_parameter, _some_samples)


def _times(factor: float, n: int | None) -> str:
    """Return a factor in words that follow "is" and precede "the truth": "1/64 of", "2 times", "the negative of"."""
    if abs(factor + 1) < 0.01:
        return "the negative of"
    inverse = round(1 / factor) if 0 < factor < 1 else 0
    if inverse > 1 and abs(factor * inverse - 1) < 0.01:
        return f"1/{inverse} of"
    if n and n > 1 and abs(factor / n - 1) < 0.01:
        return f"{n} times"
    return f"{factor:.6g} times"


def _worst(d: Difference) -> str:
    tiny = torch.finfo(torch.float64).tiny
    errors = {k: (d.g[k] - d.t[k]).norm(dim=1) / d.t[k].norm(dim=1).clamp_min(tiny) for k in d.t}
    name = max(errors, key=lambda k: float(errors[k].max()))
    row = int(errors[name].argmax())
    where = f"`{name}`, sample {row}" if d.quantity in PER_SAMPLE else f"`{name}`"
    return f"worst at {where}, off by {float(errors[name][row]):.2g} of its norm"


def _which(rows: Tensor) -> str:
    index = rows.nonzero().flatten().tolist()
    return "every sample" if len(index) == len(rows) else f"{len(index)} of {len(rows)} samples ({_shown(index)})"


def _shown(items: Sequence[object]) -> str:
    more = len(items) - SHOWN
    return ", ".join(str(item) for item in items[:SHOWN]) + (f" and {more} more" if more > 0 else "")
