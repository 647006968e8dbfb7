"""Runs → rows: what the page, its figures and the exports show, whatever version of the schema wrote the records."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from testbed.records import Record
from testbed.report.runs import Run

ORDINARY, LIMIT = "ordinary step", "limit"


@dataclass(frozen=True)
class Row:
    """A line of the table: a cell, the ordinary step, or the limit. Times in seconds, sizes in bytes, None: not known.

    Attributes:
        run: The run's name.
        problem: Model, data, loss, dtype and TF32 in words, without the batch size.
        batch: N; None where the record does not say.
        quantity: What was computed.
        backend: The backend with its options, or `ORDINARY`, or `LIMIT`.
        status: One of `STATUSES`; empty where the row is no backend.
        reason: Why the status is not "ok".
        native: Whether the way is the backend's own; None where the record does not say.
        median: Of the timed calls, with `p5` and `p95`; `samples` are all of them.
        ratio: Against the baseline, with its interval `ratio_ci` and `verdict`.
        step: Against the ordinary step, with its interval `step_ci`.
        peak: Bytes that a call takes beyond what was held before.
        phases: Seconds of import, prepare, first call, …, in the order they happen.
        errors: (sample, relative error), with the samples in `ill_conditioned`.
        error: The largest relative error.
        record: The record behind the row; None where the row is no backend.
    """

    run: str
    problem: str
    batch: int | None
    quantity: str
    backend: str
    status: str = ""
    reason: str = ""
    native: bool | None = None
    median: float | None = None
    p5: float | None = None
    p95: float | None = None
    samples: tuple[float, ...] = ()
    ratio: float | None = None
    ratio_ci: tuple[float, float] | None = None
    verdict: str = ""
    baseline: str = ""
    step: float | None = None
    step_ci: tuple[float, float] | None = None
    peak: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    errors: tuple[tuple[int, float], ...] = ()
    ill_conditioned: tuple[int, ...] = ()
    error: float | None = None
    record: Record | None = None

    @property
    def group(self) -> tuple[str, str, str]:
        """What is drawn together: a run's problem, whatever the batch size, and quantity."""
        return self.run, self.problem, self.quantity


PLACE: dict[str, Callable[[Row], str]] = {
    "run": lambda row: row.run,
    "quantity": lambda row: row.quantity,
    "problem": lambda row: row.problem,
    "batch": lambda row: "" if row.batch is None else f"N={row.batch}",
}


@dataclass(frozen=True)
class Places:
    """Names where a row belongs by what differs among the rows of a page: run, quantity, problem, batch size.

    Attributes:
        differ: Which of the four do.
    """

    differ: frozenset[str]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Self:
        """Return the names for these rows."""
        return cls(frozenset(part for part in PLACE if len({PLACE[part](row) for row in rows}) > 1))

    def without(self, part: str) -> Self:
        """Return the names without one of the four."""
        return type(self)(self.differ - {part})

    def __call__(self, row: Row) -> str:
        """Return where a row belongs; empty where all belong to the same."""
        return " · ".join(name(row) for part, name in PLACE.items() if part in self.differ and name(row))

    def shared(self, row: Row) -> str:
        """Return what is the same for all rows, but for the run."""
        same = (name(row) for part, name in PLACE.items() if part not in self.differ and part != "run")
        return " · ".join(filter(None, same))


def rows_of(run: Run) -> list[Row]:
    """Return the rows of a run: of each problem and quantity the right cells, the others, then the reference lines."""
    groups: dict[tuple[str, int | None, str], list[Record]] = {}
    for record in run.records:
        groups.setdefault((problem_of(record), batch_of(record), record.quantity), []).append(record)
    return [row for group in groups.values() for row in _group(run.name, group)]


def problem_of(record: Record) -> str:
    """Return model, data, loss, dtype and TF32 in words."""
    p = record.problem
    names = [str(p[key]) for key in ("model", "data", "loss", "case") if p.get(key)]
    trained = [f"trained {p['train_steps']} steps"] if p.get("train_steps") else []
    arithmetic = [str(p["dtype"])] if p.get("dtype") else []
    arithmetic += ["TF32"] if p.get("tf32") else []
    return ", ".join([*names, *trained, *arithmetic]) or "problem not recorded"


def batch_of(record: Record) -> int | None:
    """Return N, or None where the record does not say."""
    n = record.problem.get("batch_size")
    return n if isinstance(n, int) else None


def device_of(record: Record) -> str:
    """Return the device in words: the GPU, or the processor and its threads."""
    env = record.environment
    if isinstance(gpu := env.get("gpu"), dict):
        return str(gpu.get("name", "GPU"))
    count = env.get("threads")
    threads = f", {count} thread{'' if count == 1 else 's'}" if count else ""
    return f"{env.get('processor') or env.get('device') or 'device not recorded'}{threads}"


def _group(run: str, records: Sequence[Record]) -> Iterator[Row]:
    first = records[0]
    shared: dict[str, Any] = {
        "run": run,
        "problem": problem_of(first),
        "batch": batch_of(first),
        "quantity": first.quantity,
    }
    for record in sorted(records, key=lambda r: r.status != "ok"):
        yield _cell(shared, record)
    step = next((found for r in records if (found := _part(r.timing, "ordinary")).get("median_s")), {})
    limit = next((found for r in records if (found := _part(r.timing, "limit")).get("seconds")), {})
    if step:
        yield Row(**shared, backend=ORDINARY, step=1.0, peak=_number(step.get("peak_bytes")), **_times(step))
    if limit:
        seconds = limit["seconds"]
        yield Row(**shared, backend=LIMIT, median=seconds, step=seconds / step["median_s"] if step else None)


def _cell(shared: dict[str, Any], record: Record) -> Row:
    timing, step = record.timing, _part(record.timing, "ordinary")
    precision = _part(record.agreement, "precision")
    return Row(
        **shared,
        backend=record.label,
        status=record.status,
        reason=record.reason,
        native=timing.get("native"),
        **_times(timing),
        ratio=_number(timing.get("ratio")),
        ratio_ci=_interval(timing.get("ratio_ci")),
        verdict=timing.get("verdict") or "",
        baseline=timing.get("baseline") or "",
        step=_number(step.get("ratio")),
        step_ci=_interval(step.get("ratio_ci")),
        peak=_number(record.memory.get("peak_bytes")),
        phases=_phases(record),
        errors=tuple((i, e) for i, e in precision.get("errors", ()) if _number(e) is not None),
        ill_conditioned=tuple(precision.get("ill_conditioned", ())),
        error=_number(precision.get("error")),
        record=record,
    )


def _phases(record: Record) -> dict[str, float]:
    """Return {phase in words: seconds}, in the order of the record, with the steady state at the end."""
    named = {key: _number(value) for key, value in record.phases.items() if key.endswith("_s")}
    found = {key.removesuffix("_s").replace("_", " "): value for key, value in named.items() if value is not None}
    steady = _number(record.timing.get("median_s"))
    return found if steady is None else {**found, "steady": steady}


def _times(timing: dict[str, Any]) -> dict[str, Any]:
    median = _number(timing.get("median_s"))
    if median is None:
        return {}
    low, high = _number(timing.get("p5_s")), _number(timing.get("p95_s"))
    samples = tuple(s for s in timing.get("samples_s", ()) if _number(s) is not None)
    return {"median": median, "p5": low or median, "p95": high or median, "samples": samples}


def _part(data: dict[str, Any], key: str) -> dict[str, Any]:
    part = data.get(key)
    return part if isinstance(part, dict) else {}


def _number(value: object) -> float | None:
    """Return a finite number; None for what is none, or for the text that JSON has instead of NaN."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _interval(value: object) -> tuple[float, float] | None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = map(_number, value)
    return None if low is None or high is None else (low, high)
