"""The form of a result: names, shapes, dtypes, devices, finite numbers; what is wrong with it in one sentence."""

from collections.abc import Sequence

from torch import Tensor, nn

from testbed.agreement import Result, Rows, norms

SHOWN = 3  # names or rows in a sentence


def wrong_form(result: object, truth: Result) -> str | None:
    """Return what is wrong with the form of a result: its type, names, shapes or graph; None if nothing is.

    Args:
        result: What a backend returned.
        truth: What has the right form.
    """
    if isinstance(truth, Tensor):
        return _wrong_tensor("the result", result, truth)
    if type(result) is not dict:  # a lazy mapping would be timed before it has computed anything
        return f"the result is a {type(result).__name__}, not a dict {{parameter name: tensor}}"
    missing, extra = [n for n in truth if n not in result], [n for n in result if n not in truth]
    if missing and len(missing) == len(extra):
        pairs = shown([f"`{a}` for `{b}`" for a, b in zip(extra, missing, strict=True)])
        return f"parameters are renamed: {pairs}"
    if missing:
        return f"{len(missing)} of {len(truth)} parameters are missing: {shown([f'`{n}`' for n in missing])}"
    if extra:
        return f"there are extra parameters: {shown([f'`{n}`' for n in extra])}"
    wrong = [_wrong_tensor(f"`{name}`", result[name], t) for name, t in truth.items()]
    return next((w for w in wrong if w), None)


def _wrong_tensor(what: str, found: object, truth: Tensor) -> str | None:
    if type(found) not in (Tensor, nn.Parameter):  # a lazy tensor would be timed before it has computed anything
        return f"{what} is a {type(found).__name__}, not a tensor {list(truth.shape)}"
    assert isinstance(found, Tensor)
    if found.layout != truth.layout:
        return f"{what} has the layout {found.layout}, not {truth.layout}"
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
    bad = ~norms(result).isfinite()
    return f"nonfinite numbers in {_places(bad, truth)}" if bad.any() and (bad := bad & _finite(truth)).any() else None


def hidden(result: Rows, truth: Rows) -> str | None:
    """Return where a result is finite though the truth is NaN or infinite: a broken sample must show."""
    bad = ~_finite(truth) & norms(result).isfinite()
    return f"finite numbers in {_places(bad, truth)}, where the truth is not finite" if bad.any() else None


def not_finite(truth: Rows) -> str:
    """Return where the truth itself is NaN or infinite; an empty string where it is nowhere."""
    bad = ~_finite(truth)
    return _places(bad, truth) if bad.any() else ""


def _finite(rows: Rows) -> Tensor:
    """Return which rows of which parameters are finite [R, P]."""
    return norms(rows).isfinite()


def _places(bad: Tensor, truth: Rows) -> str:
    names = [f"`{name}`" for name, b in zip(truth, bad.T, strict=True) if b.any()]
    return f"{shown(names)}, {which(bad.any(1))}" if len(bad) > 1 else shown(names)


def which(rows: Tensor) -> str:
    """Return the rows that are marked, in words: "2 of 32 samples (3, 4)"."""
    index = rows.nonzero().flatten().tolist()
    return "every sample" if len(index) == len(rows) else f"{len(index)} of {len(rows)} samples ({shown(index)})"


def shown(items: Sequence[object]) -> str:
    """Return the first few items, and how many more there are."""
    more = len(items) - SHOWN
    return ", ".join(str(item) for item in items[:SHOWN]) + (f" and {more} more" if more > 0 else "")
