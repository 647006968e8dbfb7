"""A disagreement, explained: given only the result and the truth, one sentence that says what is wrong.

The explanations are tried from the most to the least specific; each is a function of result and truth that returns
its sentence, or None where it does not fit.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from testbed.agreement import PER_SAMPLE, Rows, norms

NAMES_SHOWN = 3


def wrong_form(result: object, truth: Mapping[str, Tensor] | Tensor) -> str | None:
    """Return what is wrong with the form of a result: its type, names, shapes or graph; None if nothing is.

    Args:
        result: What a backend returned.
        truth: What has the right form, in any dtype.
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
    if found.requires_grad:
        return f"{what} still owns a graph; results are detached"
    if found.device != truth.device:
        return f"{what} is on {found.device}, the model on {truth.device}"
    return None


def nonfinite(result: Rows, truth: Rows) -> str | None:
    """Return where a result is NaN or infinite though the truth is not; None where it is finite."""
    if norms(result).isfinite().all():  # cheaper than looking at every number
        return None
    bad = {name: ~t.isfinite() & truth[name].isfinite() for name, t in result.items()}
    names = [name for name, b in bad.items() if b.any()]
    if not names:
        return None
    rows = torch.stack([b.flatten(1).any(1) for b in bad.values()]).any(0)
    return f"nonfinite numbers in {_shown([f'`{n}`' for n in names])}, {_which_rows(rows)}"


def explain(result: Rows, truth: Rows, quantity: str) -> str:
    """Return one sentence that says how a result of the right form differs from the truth.

    Args:
        result: The rows that disagree, any dtype.
        truth: The right ones, float64.
        quantity: Of what, since it says what a row is.
    """
    g = {name: t.double() for name, t in result.items()}
    t = {name: truth[name].double() for name in result}
    subject = {"grads": "every gradient", "norms": "every norm", "gram": "every inner product"}.get(
        quantity, "the result"
    )
    found = next((s for s in (e(g, t, subject, quantity) for e in EXPLANATIONS) if s), None)
    return found or f"differs from the truth: {_worst(g, t, quantity)}"


Explanation = Callable[[Rows, Rows, str, str], str | None]

CLOSE = (
    1e-3  # an explanation fits when it leaves less than this share of the error, or of the truth where both are near
)


def _zeros(g: Rows, t: Rows, subject: str, quantity: str) -> str | None:
    return None if any(x.any() for x in g.values()) else f"{subject} is zero"


def _scaled(g: Rows, t: Rows, subject: str, quantity: str) -> str | None:
    factor = _factor(g, t)
    if factor is None:
        return None
    n = len(next(iter(t.values()))) if quantity in PER_SAMPLE else None
    return (
        f"{subject} is {_times(factor, n)} of the truth"
        if factor > 0
        else f"{subject} has the wrong sign ({_times(factor, n)})"
    )


def _equal_rows(g: Rows, t: Rows, subject: str, quantity: str) -> str | None:
    n = len(next(iter(g.values())))
    if quantity != "grads" or n < 2 or not all(_near(x, x[:1].expand_as(x)) for x in g.values()):
        return None
    for what, same in (("the average", lambda x: x.mean(0)), ("the sum", lambda x: x.sum(0))):
        if all(_near(g[k][0], same(t[k])) for k in t):
            return f"every sample has the same gradient, {what} over the batch"
    for i in range(n):
        if all(_near(g[k][0], t[k][i]) for k in t):
            return f"every sample has the same gradient, that of sample {i}"
    return "every sample has the same gradient"


def _permuted(g: Rows, t: Rows, subject: str, quantity: str) -> str | None:
    n = len(next(iter(g.values())))
    if quantity not in ("grads", "norms") or n < 2:
        return None
    G, T = (torch.cat([x.flatten(1) for x in rows.values()], 1) for rows in (g, t))
    source = torch.cdist(G, T).argmin(1)
    if len(source.unique()) != n or not _near(G, T[source]):
        return None
    moved = (source != torch.arange(n, device=source.device)).nonzero().flatten().tolist()
    if source.tolist() == list(range(n - 1, -1, -1)):
        how = "in reverse"
    elif len(shift := {(int(s) - i) % n for i, s in enumerate(source)}) == 1:
        how = f"rotated by {shift.pop()}"
    else:
        how = _shown([f"row {i} is sample {int(source[i])}" for i in moved])
    return f"the samples are permuted: {how}"


def _one_parameter(g: Rows, t: Rows, subject: str, quantity: str) -> str | None:
    wrong = [k for k in t if not _near(g[k], t[k])]
    if len(t) < 2 or not wrong or len(wrong) > len(t) / 2:
        return None
    rest = explain({k: g[k] for k in wrong}, {k: t[k] for k in wrong}, quantity) if len(wrong) < len(t) else ""
    return f"only {_shown([f'`{k}`' for k in wrong])} of {len(t)} parameters: {rest}"


def _some_samples(g: Rows, t: Rows, subject: str, quantity: str) -> str | None:
    n = len(next(iter(t.values())))
    wrong = torch.tensor([any(not _near(g[k][i], t[k][i]) for k in t) for i in range(n)])
    if quantity not in ("grads", "norms") or not wrong.any() or int(wrong.sum()) > n / 2:
        return None
    index = wrong.nonzero().flatten()
    rest = explain({k: g[k][index] for k in t}, {k: t[k][index] for k in t}, quantity)
    return f"only {_which_rows(wrong)}: {rest}"


EXPLANATIONS: tuple[Explanation, ...] = (_zeros, _scaled, _equal_rows, _permuted, _one_parameter, _some_samples)


def _near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= CLOSE * b.norm())


def _factor(g: Rows, t: Rows) -> float | None:
    """Return c where g = c·t and c is not 1, or None."""
    square = sum(float((x * x).sum()) for x in t.values())
    if not square:
        return None
    c = sum(float((g[k] * t[k]).sum()) for k in t) / square
    gap = sum(float((g[k] - c * t[k]).square().sum()) for k in t) ** 0.5
    error = sum(float((g[k] - t[k]).square().sum()) for k in t) ** 0.5
    return c if gap <= 0.1 * error and gap <= CLOSE * abs(c) * square**0.5 else None


def _times(factor: float, n: int | None) -> str:
    """Return a factor in words that follow "is" and precede "of the truth": "1/64", "2 times that", …."""
    if factor < 0:
        return "the negative" if abs(factor + 1) < 0.01 else f"{factor:.6g} times that"
    inverse = round(1 / factor) if factor < 1 else 0
    if inverse > 1 and abs(factor * inverse - 1) < 0.01:
        return f"1/{inverse}"
    if n and n > 1 and abs(factor / n - 1) < 0.01:
        return f"{n} times that"
    return f"{factor:.6g} times that"


def _worst(g: Rows, t: Rows, quantity: str) -> str:
    errors = {k: (g[k] - t[k]).flatten(1).norm(dim=1) / t[k].flatten(1).norm(dim=1).clamp_min(1e-300) for k in t}
    name = max(errors, key=lambda k: float(errors[k].max()))
    row = int(errors[name].argmax())
    where = f", sample {row}" if quantity in PER_SAMPLE else ""
    return f"worst at `{name}`{where}, off by {float(errors[name][row]):.2g} of its norm"


def _which_rows(rows: Tensor) -> str:
    index = rows.nonzero().flatten().tolist()
    if len(index) == len(rows):
        return "every sample"
    return f"{len(index)} of {len(rows)} samples ({_shown([str(i) for i in index])})"


def _shown(items: list[str]) -> str:
    more = len(items) - NAMES_SHOWN
    return ", ".join(items[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
