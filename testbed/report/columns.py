"""The columns of the page's table and of the CSV file: how a row's value is shown, and by what it is sorted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from testbed.report import units
from testbed.report.rows import Row
from testbed.report.verdict import is_backend

Value = float | int | str | None


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        key: Its name for programs, with the unit: `median_s`.
        name: Its name for people.
        value: A row's value, in seconds or bytes where it is a time or a size.
        text: The value as people read it.
        words: Whether its values are words: aligned to the left, and one of them may be chosen in the page.
        may_hide: Whether it is left out where all rows have the same value.
    """

    key: str
    name: str
    value: Callable[[Row], Value]
    text: Callable[[Row], str]
    words: bool = False
    may_hide: bool = False


def visible(rows: Sequence[Row]) -> list[Column]:
    """Return the columns for people that tell these rows apart; one baseline is called by its name."""
    baselines = {row.baseline for row in rows if row.baseline}
    names = {RATIO.key: f"× {baselines.pop()}"} if len(baselines) == 1 else {}
    told = (c for c in PAGE if not (c.may_hide and len({c.value(row) for row in rows}) < 2))
    return [replace(c, name=names.get(c.key, c.name)) for c in told]


def agrees(row: Row) -> str:
    """Return whether a cell agrees with the truth, in words."""
    if row.record is None:
        return ""
    if row.status != "ok":
        return "no" if row.record.diagnosis else "–"
    if row.ill_conditioned:
        return f"yes, {len(row.ill_conditioned)} ill-conditioned"
    asked = row.record.agreement.get("rule") != "calibrated" or "same_function" in row.record.agreement
    return "yes" if asked else "yes, float64 not asked"


def _words(key: str, name: str, value: Callable[[Row], str], may_hide: bool = False) -> Column:
    return Column(key, name, value, value, words=True, may_hide=may_hide)


def _seconds(key: str, name: str, value: Callable[[Row], float | None]) -> Column:
    return Column(key, name, value, lambda row: units.seconds(value(row)) if is_backend(row) else "")


def _raw(key: str, value: Callable[[Row], Value]) -> Column:
    return Column(key, key, value, lambda row: "" if value(row) is None else str(value(row)))


def _end(pair: tuple[float, float] | None, which: int) -> float | None:
    return pair[which] if pair else None


def _ratio(row: Row, value: float | None, pair: tuple[float, float] | None) -> str:
    if value is None and not is_backend(row):
        return ""
    if value == 1:  # of the baseline, or the ordinary step: no interval, it is the measure
        return "1"
    return units.ratio(value) + units.interval(list(pair) if pair else None)


def _median(row: Row) -> str:
    if row.median is None:
        return "–"
    spread = f" {units.spread(row.median, row.p5, row.p95)}" if row.p5 and row.p95 else ""
    return units.seconds(row.median) + spread


def _way(row: Row) -> str:
    if row.native is None:
        return ""
    return "native" if row.native else "derived"


RUN = _words("run", "run", lambda r: r.run, may_hide=True)
QUANTITY = _words("quantity", "quantity", lambda r: r.quantity, may_hide=True)
PROBLEM = _words("problem", "problem", lambda r: r.problem, may_hide=True)
BATCH = Column("batch_size", "N", lambda r: r.batch, lambda r: str(r.batch or ""), may_hide=True)
BACKEND = _words("backend", "backend", lambda r: r.backend)
STATUS = _words("status", "status", lambda r: r.status)
AGREES = _words("agrees", "agrees", agrees)
WAY = _words("way", "way", _way)
MEDIAN = Column("median_s", "median", lambda r: r.median, _median)
RATIO = Column("ratio_to_baseline", "× baseline", lambda r: r.ratio, lambda r: _ratio(r, r.ratio, r.ratio_ci))
STEP = Column("ratio_to_step", "× step", lambda r: r.step, lambda r: _ratio(r, r.step, r.step_ci))
PEAK = Column(
    "peak_bytes",
    "peak",
    lambda r: None if r.peak is None else int(r.peak),
    lambda r: units.size(r.peak) if is_backend(r) or r.peak else "",
)
FIRST = _seconds("first_call_s", "first call", lambda r: r.phases.get("first call"))

PAGE = (RUN, QUANTITY, PROBLEM, BATCH, BACKEND, STATUS, MEDIAN, RATIO, STEP, PEAK, FIRST, AGREES, WAY)
CSV = (
    *(RUN, QUANTITY, PROBLEM, BATCH, BACKEND, STATUS, AGREES, WAY, MEDIAN),
    _raw("p5_s", lambda r: r.p5),
    _raw("p95_s", lambda r: r.p95),
    _raw("timed_calls", lambda r: len(r.samples) or None),
    RATIO,
    _raw("ratio_to_baseline_low", lambda r: _end(r.ratio_ci, 0)),
    _raw("ratio_to_baseline_high", lambda r: _end(r.ratio_ci, 1)),
    _raw("verdict", lambda r: r.verdict),
    STEP,
    _raw("ratio_to_step_low", lambda r: _end(r.step_ci, 0)),
    _raw("ratio_to_step_high", lambda r: _end(r.step_ci, 1)),
    PEAK,
    _raw("import_s", lambda r: r.phases.get("import")),
    _raw("prepare_s", lambda r: r.phases.get("prepare")),
    FIRST,
    _raw("largest_error", lambda r: r.error),
    _raw("reason", lambda r: r.reason),
)
