"""When gradients are the same, and when what a sample shows is what it was."""

import torch
from torch import Tensor

from backends.base import Named
from backends.precision import rounding

COARSE = 2.0**-10
"""`finfo.eps` of float16; bfloat16's is larger."""

SAME = ((COARSE, 0.1), (2.0**-23, 0.01), (0.0, 1e-6))
"""(roundings of at least this size, how far gradients may be apart, relative to their norm, that are the same but for
rounding and kinks)."""

NOISE = 8
"""Roundings of the whole gradient that one of a parameter may be apart besides: some are zero but for rounding."""

KINKS = 10.0
"""Times as far apart they may be where numbers are made up, which are large, or a batch is large, whose matrices are
multiplied in other blocks: more of a net's ReLUs are on the other side of a kink."""

KINKS_COARSELY = 3.0
"""The same of bfloat16 and float16, where ten times as far would be as far as the gradient is long."""

UNTOUCHED = 64
"""Roundings by which what a sample shows may change with another sample: matrices may be multiplied in other blocks."""

UNTOUCHED_COARSELY = 8
"""The same of bfloat16 and float16, of which 64 would hide a lot of another sample."""


@torch.no_grad()
def near(ours: Named, theirs: Named, slack: float = 1.0) -> bool:
    """Return whether one sample's gradients are the same; of those that are not finite, only that they are not."""
    eps = rounding(next(iter(theirs.values())))
    share, noise = slack * next(share for least, share in SAME if eps >= least), NOISE * eps
    if any(ours[name].shape != t.shape for name, t in theirs.items()):
        return False
    norms = torch.stack([t.norm() for t in theirs.values()])
    if not norms.isfinite().all():
        return not all(ours[name].isfinite().all() for name in theirs)
    gaps = torch.stack([(ours[name] - t).norm() for name, t in theirs.items()])
    return bool((gaps <= share * norms + noise * norms.norm()).all())


def same(before: Tensor, after: Tensor, kept: Tensor) -> bool:
    """Return whether the kept samples show the same in what goes into a tap, or comes back to it [N, ...]."""
    if before.shape != after.shape:
        return False
    wide = torch.promote_types(before.dtype, torch.float32)
    a, b = (t[kept].flatten(1).to(wide).nan_to_num() for t in (before, after))
    return bool(((a - b).norm(dim=1) <= _untouched(before) * a.norm(dim=1)).all())


def _untouched(like: Tensor) -> float:
    """Return how much of itself a tensor may change by when it is the same: autocast leaves tensors in their dtypes."""
    eps = torch.finfo(like.dtype).eps if like.is_floating_point() else 0.0
    return (UNTOUCHED_COARSELY if eps >= COARSE else UNTOUCHED) * eps


def fingerprint(g: Tensor) -> tuple[float, ...]:
    """Return a few numbers that differ where gradients do."""
    flat = (torch.view_as_real(g) if g.is_complex() else g).flatten()
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return tuple(torch.stack([flat.norm(), flat.sum(), flat[::3].sum()]).tolist())
