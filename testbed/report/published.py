"""What publications say, and what was measured here of the same."""

import math
from collections.abc import Iterator, Sequence

from testbed.config.experiment import Published
from testbed.environment import device_name
from testbed.records import Record
from testbed.report import units


def heading(size: str | None) -> str:
    """Return the heading; it says which size of the experiment ours are of."""
    return f"Published / here, at size '{size}'" if size else "Published / here"


def comparisons(published: Sequence[Published], records: Sequence[Record]) -> Iterator[str]:
    """Yield a line for each figure: the publication, its hardware, what it says, and ours where it was measured."""
    for found in published:
        source = f"{found.source} ({found.hardware})" if found.hardware else found.source
        said = found.what or "states no figure for this."
        yield f"{source}: {said}{_figures(found, records)}"


def _figures(found: Published, records: Sequence[Record]) -> str:
    if found.figure is None:
        return ""
    ours = [text for r in _same(found, records) if (text := _ours(found, r))]
    here = f"here {', '.join(ours)}" if ours else "not measured here"
    what = " ".join(part for part in (found.backend, found.quantity) if part)
    return f" {f'{what}: ' if what else ''}published {units.ratio(found.figure)} × {_unit(found, records)} / {here}."


def _same(found: Published, records: Sequence[Record]) -> Iterator[Record]:
    """Yield the records of the same backend and quantity; where no backend is named, of the cheapest right one.

    A figure that names no quantity is held against every one that was measured.
    """
    right = [r for r in records if r.status == "ok"]
    right = [r for r in right if found.quantity in (None, r.quantity, r.quantity.partition("(")[0])]
    if found.backend:
        yield from (r for r in right if found.backend in (r.label, r.backend))
        return
    cells: dict[tuple[str, str], list[Record]] = {}
    for r in right:
        cells.setdefault((str(r.problem), r.quantity), []).append(r)
    for group in cells.values():
        yield min(group, key=lambda r: r.timing.get("median_s", math.inf))


def _ours(found: Published, r: Record) -> str:
    against = r.timing.get("ordinary") if found.relative_to == "step" else r.timing
    if not against or not against.get("ratio"):
        return ""
    measured = f"{units.ratio(against['ratio'])}{units.interval(against.get('ratio_ci'))}"
    by = ("" if found.backend else f"{r.label}, ") + ("" if found.quantity else f"{r.quantity}, ")
    return f"{measured} ({by}N={r.problem['batch_size']}, {device_name(r.environment)})"


def _unit(found: Published, records: Sequence[Record]) -> str:
    if found.relative_to == "step":
        return "step"
    return next((str(r.timing["baseline"]) for r in records if r.timing.get("baseline")), "baseline")
