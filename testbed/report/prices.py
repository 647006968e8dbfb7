"""What a quantity costs in training steps: with the cheapest right backend, and with the others."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """What one backend takes for a quantity, in ordinary training steps of the same problem.

    Attributes:
        backend: Its label.
        value: Median time by the ordinary step's median.
        low: Lower end of the 95 % interval.
        high: Upper end of it.
    """

    backend: str
    value: float
    low: float
    high: float

    def same_as(self, other: "Price") -> bool:
        """Return whether the two cannot be told apart: the intervals overlap."""
        return self.low <= other.high and other.low <= self.high


def prices(records: Sequence[Record]) -> list[Price]:
    """Return the prices of one problem and quantity, of every right result that was timed, the cheapest first."""
    steps = [(r, r.timing["ordinary"]) for r in records if r.status == "ok" and r.timing.get("ordinary")]
    found = [Price(r.label, step["ratio"], *step["ratio_ci"]) for r, step in steps]
    return sorted(found, key=lambda price: price.value)


def sentence(quantity: str, found: Sequence[Price]) -> str:
    """Return the prices of a quantity in words: "Norms cost 1.4 training steps with …, the cheapest; 4.8 with …"."""
    name, bracket, options = quantity.partition("(")
    verb = COST.get(name, f"{name} costs")
    if bracket:  # the options go before the verb
        verb = verb.replace(" cost", f" ({options} cost", 1)
    best, *others = found
    ending = "" if best.value == 1 else "s"
    said = f"{verb} {units.ratio(best.value)} training step{ending} with {best.backend}, the cheapest right backend"
    if others:
        said += "; " + ", ".join(f"{units.ratio(p.value)} with {p.backend}" for p in others[:SHOWN])
        said += f", more with {len(others) - SHOWN} others" if len(others) > SHOWN else ""
    same = [p.backend for p in others if p.same_as(best)]
    return f"{said}. {', '.join(same)} cannot be told apart from it." if same else f"{said}."
