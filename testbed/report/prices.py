"""What a quantity costs in training steps: with the cheapest right backend, and with the others."""

from collections.abc import Sequence
from dataclasses import dataclass

from testbed import timing
from testbed.records import Record
from testbed.report import units

COST = {
    "grads": "Per-sample gradients cost",
    "norms": "Norms cost",
    "clipped_sum": "Clipped sums cost",
    "variance": "The variance costs",
    "gram": "The Gram matrix costs",
}
"""The beginning of a sentence on the price of a quantity."""

SHOWN = 4  # others in a sentence


@dataclass(frozen=True)
class Price:
    """What one backend takes for a quantity.

    Attributes:
        backend: Its label.
        value: Median time, in ordinary training steps of the same problem.
        samples: Seconds, round by round.
        floor: How far the baseline seems to be from itself, as |log|.
    """

    backend: str
    value: float
    samples: tuple[float, ...]
    floor: float

    def is_less_than(self, other: "Price") -> bool:
        """Return whether it is cheaper by more than the noise; both were timed in the same rounds."""
        return timing.verdict(timing.ratio(self.samples, other.samples), self.floor) == "faster"


def prices(records: Sequence[Record]) -> list[Price]:
    """Return the prices of one problem and quantity, of every right result that was timed, the cheapest first."""
    found = [
        Price(r.label, r.timing["ordinary"]["ratio"], tuple(r.timing["samples_s"]), r.timing.get("floor") or 0.0)
        for r in records
        if r.status == "ok" and (r.timing.get("ordinary") or {}).get("ratio") and r.timing.get("samples_s")
    ]
    return sorted(found, key=lambda price: price.value)


def sentence(quantity: str, found: Sequence[Price], baseline: str | None) -> str:
    """Return the prices of a quantity in words.

    "Norms cost 1.40 training steps with bookkeeping, the cheapest right backend; 4.80 with vmap, 5.90 with naive."

    Args:
        quantity: With its options.
        found: Its prices, the cheapest first; at least one.
        baseline: The label of the backend that another sentence compares with.
    """
    name, bracket, options = quantity.partition("(")
    verb = COST.get(name, f"{name} costs")
    if bracket:  # the options go before the verb
        verb = verb.replace(" cost", f" ({options} cost", 1)
    best, *others = found
    said = f"{verb} {units.ratio(best.value)} training steps with {best.backend}, the cheapest right backend"
    if others:
        said += "; " + ", ".join(f"{units.ratio(p.value)} with {p.backend}" for p in others[:SHOWN])
        said += f", more with {len(others) - SHOWN} others" if len(others) > SHOWN else ""
    near = [p.backend for p in others if p.backend != baseline and not best.is_less_than(p)]
    return f"{said}. Its lead over {', '.join(near)} may be noise." if near else f"{said}."
