"""Records as a run would leave them, made up: what reports and comparisons are tested on."""

from dataclasses import replace
from typing import Any

from testbed.records import STATUSES, Record

MACHINE = {
    "device": "cpu",
    "processor": "Abacus",
    "threads": 1,
    "versions": {"torch": "9.9"},
    "commit": "abcdef0123",
    "dirty": False,
    "backend_source": "1",
    "schema": 1,
}
WOBBLE = (0.97, 0.99, 1.0, 1.0, 1.0, 1.01, 1.03, 1.0, 1.0, 1.0)  # a round's time, in medians


def times(median: float) -> dict[str, Any]:
    """Return what a record says of timed calls."""
    return {
        "median_s": median,
        "p5_s": 0.97 * median,
        "p95_s": 1.03 * median,
        "samples_s": [w * median for w in WOBBLE],
    }


def record(
    backend: str = "vmap",
    median: float = 0.1,
    *,
    status: str = "ok",
    quantity: str = "grads",
    n: int = 4,
    **changes: Any,
) -> Record:
    """Return a record of a right, timed cell, or of one that ended with another status; its step takes 50 ms."""
    ok = status == "ok"
    step = {**times(0.05), "ratio": median / 0.05, "ratio_ci": [0.98 * median / 0.05, 1.02 * median / 0.05]}
    against = {"ratio": median / 0.2, "ratio_ci": [0.98 * median / 0.2, 1.02 * median / 0.2], "verdict": "faster"}
    timing = {**times(median), **against, "ordinary": step, "limit": {"seconds": 0.01}, "baseline": "naive"}
    timing |= {"floor": 0.02, "rounds": 10, "stopped_by": "rounds", "native": True}
    errors = [[i, 1e-7 * (i + 1)] for i in range(n)]
    precision = {"agrees": True, "error": 1e-7 * n, "ill_conditioned": [1], "errors": errors}
    made = Record(
        cell=f"{backend}-{quantity}-{n}",
        experiment="made up",
        problem={"model": "mlp", "data": "random", "loss": "nll", "batch_size": n, "dtype": "float32", "device": "cpu"},
        backend=backend,
        options={},
        quantity=quantity,
        status=status,
        reason="" if ok else f"made to be {status}",
        agreement={"rule": "calibrated", "same_function": {}, "precision": precision} if ok else {"rule": "calibrated"},
        diagnosis="made to be wrong" if status in ("disagrees", "nonfinite") else "",
        phases={"import_s": 1e-5, "prepare_s": 1e-3, "first_call_s": 2 * median} if ok else {},
        timing=timing if ok else {"native": True},
        memory={"peak_bytes": 1000 * n} if ok else {},
        environment=MACHINE,
    )
    return replace(made, **changes)


MANY = [record("naive", 0.2), record(), *(record(f"b_{s}", status=s) for s in STATUSES if s != "ok")]
SIZES = [record(b, t * n, n=n) for n in (4, 8, 16) for b, t in (("naive", 0.2), ("vmap", 0.1))]
