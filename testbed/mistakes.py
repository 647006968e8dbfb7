"""What people compute by mistake under the name of a quantity; the referee compares with it to name the mistake."""

from collections.abc import Mapping
from typing import Any

import torch

from backends.base import Named, clip_factors, norms_of, rows_of
from testbed.agreement import Result


def often_meant(quantity: str, options: Mapping[str, Any], grads: Named) -> dict[str, Result]:
    """Return wrong results that are often meant instead of a quantity, by what they are.

    Args:
        quantity: The quantity's name.
        options: Its options.
        grads: The true per-sample gradients, {name: [N, *shape]}.
    """
    norms = norms_of(grads)
    if quantity == "norms":
        return {"the norm squared": norms.square(), "the largest parameter's norm, not that of all": _largest(grads)}
    if quantity == "clipped_sum":
        limit = float(options.get("max_norm", 1.0))
        return {
            "the unclipped sum": {k: t.sum(0) for k, t in grads.items()},
            "clipped per parameter, not over all": _clipped_per_parameter(grads, limit),
            "the sum of gradients scaled to the limit, small ones too": _sum(grads, limit / norms),
            "clipped by the squared norm": _sum(grads, clip_factors(norms.square(), limit)),
        }
    if quantity == "variance":
        return {"the second moment, without the mean subtracted": {k: t.square().mean(0) for k, t in grads.items()}}
    if quantity == "gram":
        flat = torch.cat([rows_of(t) for t in grads.values()], 1)
        unit = flat / norms[:, None]
        return {"the cosines": unit @ unit.T, "the distances": torch.cdist(flat, flat)}
    return {}


def _largest(grads: Named) -> torch.Tensor:
    return torch.stack([rows_of(t).norm(dim=1) for t in grads.values()]).amax(0)


def _sum(grads: Named, factors: torch.Tensor) -> Named:
    return {k: torch.einsum("n,n...->...", factors, t) for k, t in grads.items()}


def _clipped_per_parameter(grads: Named, limit: float) -> Named:
    return {k: _sum({k: t}, clip_factors(norms_of({k: t}), limit))[k] for k, t in grads.items()}
