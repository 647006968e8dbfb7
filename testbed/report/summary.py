"""Who wins where: for every problem and quantity the cheapest right backend, and how that changes with N."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from testbed.records import Record
from testbed.report import units
from testbed.report.prices import Price, prices

HEADER = ("quantity", "N", "cheapest", "next")
EXPLANATION = "Prices in training steps: an ordinary step of the same problem is 1."

NEAR, RANGE = "≈ ", "…"


@dataclass(frozen=True)
class Win:
    """The outcome of one quantity at one batch size.

    Attributes:
        quantity: With its options.
        n: The batch size N.
        ranking: The prices of all right backends, the cheapest first; empty where none is right.
        baseline: The label of the backend that others are compared with.
        stopped: Whether some backend was stopped before its result was known.
    """

    quantity: str
    n: int
    ranking: tuple[Price, ...]
    baseline: str
    stopped: bool = False

    @property
    def winner(self) -> str:
        """The label of the cheapest right backend; empty where there is none."""
        return self.ranking[0].backend if self.ranking else ""

    @property
    def outcome(self) -> str:
        """The cheapest right backend, or why there is none."""
        return self.winner or ("interrupted" if self.stopped else "none right")


def wins(records: Sequence[Record], baseline: str) -> list[Win]:
    """Return the outcomes of problems that differ in the batch size only, by quantity and then N."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for r in records:
        groups.setdefault((r.quantity, r.problem.get("batch_size", 0)), []).append(r)
    order = {quantity: i for i, (quantity, _) in reversed(list(enumerate(groups)))}
    keys = sorted(groups, key=lambda key: (order[key[0]], key[1]))
    stopped = {key: any(r.status == "interrupted" for r in mine) for key, mine in groups.items()}
    return [Win(q, n, tuple(prices(groups[q, n])), baseline, stopped[q, n]) for q, n in keys]


def rows(found: Sequence[Win]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each stretch of batch sizes with one winner; the quantity is named once."""
    for quantity, mine in groupby(found, key=lambda win: win.quantity):
        for i, (outcome, stretch) in enumerate(groupby(mine, key=lambda win: win.outcome)):
            yield (quantity if i == 0 else "", *_row(outcome, list(stretch)))


def notes(found: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield what the signs in these rows mean."""
    if any(RANGE in cell for row in found for cell in row):
        yield f"a{RANGE}b: at the smallest N of the line and at the largest."
    if any(cell.startswith(NEAR) for row in found for cell in row):
        yield f"{NEAR.strip()}: the lead of the cheapest over it may be noise."


def _row(outcome: str, stretch: Sequence[Win]) -> tuple[str, ...]:
    sizes = _ends([str(win.n) for win in stretch])
    if not stretch[0].winner:
        return (sizes, outcome, "", "")
    rankings = [win.ranking for win in stretch]
    seconds = [(r[0], r[1]) for r in rankings if len(r) > 1]
    names = list(dict.fromkeys(second.backend for _, second in seconds))
    near = NEAR if any(not best.is_less_than(second) for best, second in seconds) else ""
    bases = [next((p for p in r if p.backend == win.baseline), None) for r, win in zip(rankings, stretch, strict=True)]
    return (
        sizes,
        f"{outcome} {_range([r[0] for r in rankings])}",
        f"{near}{', '.join(names)} {_range([second for _, second in seconds])}" if seconds else "–",
        _range(bases) if any(bases) else "–",
    )


def _range(found: Sequence[Price | None]) -> str:
    """Return the prices from the smallest batch to the largest."""
    return _ends([units.ratio(p.value if p else None) for p in found])


def _ends(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{texts[0]}{RANGE}{texts[-1]}"
