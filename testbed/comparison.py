"""Two runs → cell by cell: better, worse, can't tell, new, gone. Made from records alone.

A ratio is that of two median times of raw samples, with a bootstrap interval; the two runs were not interleaved, so
each is resampled by itself, and what either run's baseline differs from itself (its A/A floor) counts on both sides.
That is the noise within a run. A machine that is slower today is noise as well, and larger: the ordinary step, timed in
the same rounds, is the control. A cell is worse or better where its time is, and its time in ordinary steps is too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from testbed.environment import flat
from testbed.records import FAILED, WRONG, Record
from testbed.report.rows import batch_of, device_of, problem_of
from testbed.timing import CONFIDENCE, RESAMPLES, Ratio, verdict

VERDICTS = ("worse", "better", "can't tell", "new", "gone", "same")
TIMES = {"faster": "better", "slower": "worse", "can't tell": "can't tell"}
PLACE_ONLY = ("device",)  # what a problem says that is not the problem
NOT_OF_A_RUN = ("backend_source", "clocks", "disturbances")  # what an environment says of one backend or one moment


@dataclass(frozen=True)
class Change:
    """What became of a cell.

    Attributes:
        problem: Model, data, loss, dtype and batch size in words.
        quantity: What was computed.
        backend: The backend with its options.
        verdict: One of `VERDICTS`; "same" where neither run timed it.
        old: Median seconds in the old run, or the status; empty where the cell is new.
        new: The same in the new run; empty where the cell is gone.
        ratio: New time divided by old time; None where one of them is missing.
        in_steps: The same of the time in ordinary steps, where it was asked.
        memory: New peak divided by old peak.
        why: What else is to be known, in words.
    """

    problem: str
    quantity: str
    backend: str
    verdict: str
    old: float | str
    new: float | str
    ratio: Ratio | None = None
    in_steps: Ratio | None = None
    memory: float | None = None
    why: str = ""


def compare(old: Sequence[Record], new: Sequence[Record], *, control: bool = True) -> list[Change]:
    """Return what became of every cell, in the new run's order; what is gone comes last.

    Args:
        old: The old run's records.
        new: The new run's records.
        control: Whether a change that the ordinary step shares is no cell's; not across devices.
    """
    shared = _shared_keys(old, new)
    before = {_key(r, shared): r for r in old}
    after = {_key(r, shared): r for r in new}
    found = [_change(before.get(key), record, control) for key, record in after.items()]
    return found + [_gone(record) for key, record in before.items() if key not in after]


def drift(old: Sequence[Record], new: Sequence[Record]) -> list[Change]:
    """Return what became of the ordinary step, which no backend's code is in: it shows a change of the machine."""
    shared = _shared_keys(old, new)
    steps = [{_key(r, shared)[:2]: r for r in records if _samples(_step(r))} for records in (old, new)]
    return [_timed(steps[0][key], r, "ordinary step", _step) for key, r in steps[1].items() if key in steps[0]]


def devices(records: Sequence[Record]) -> list[str]:
    """Return the devices of a run in words: without threads and driver, which are settings."""
    return sorted({device_of(r).split(", ")[0] for r in records})


def differences(old: Sequence[Record], new: Sequence[Record]) -> dict[str, tuple[str, str]]:
    """Return {setting: (old, new)} of what differs between the runs' environments."""
    first, second = ({k: v for r in run for k, v in flat(r.environment, NOT_OF_A_RUN).items()} for run in (old, new))
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    return {key: (first.get(key, "not recorded"), second.get(key, "not recorded")) for key in keys}


def unpaired(new: Sequence[float], old: Sequence[float]) -> Ratio:
    """Return median(new) / median(old) with its bootstrap interval, each resampled by itself."""
    random = np.random.default_rng(0)

    def medians(samples: Sequence[float]) -> Any:  # noqa: ANN401  numpy's arrays
        index = random.integers(len(samples), size=(RESAMPLES, len(samples)))
        return np.median(np.asarray(samples)[index], axis=1)

    low, high = np.quantile(medians(new) / medians(old), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(float(np.median(new) / np.median(old)), float(low), float(high))


def in_steps(new: Record, old: Record) -> Ratio | None:
    """Return how many ordinary steps a call costs, new / old, with its interval; None where a run did not time them."""
    random = np.random.default_rng(0)
    values, resampled = [], []
    for record in (new, old):
        cell, step = np.asarray(_samples(record.timing)), np.asarray(_samples(_step(record)))
        n = min(len(cell), len(step))
        if n < 2:
            return None
        index = random.integers(n, size=(RESAMPLES, n))  # of rounds: both were timed in each
        values.append(np.median(cell) / np.median(step))
        resampled.append(np.median(cell[index], axis=1) / np.median(step[index], axis=1))
    low, high = np.quantile(resampled[0] / resampled[1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(float(values[0] / values[1]), float(low), float(high))


def _change(old: Record | None, new: Record, control: bool) -> Change:
    if old is None:
        return Change(*_names(new), "new", "", _shown(new), why=new.reason)
    if "ok" not in (old.status, new.status):
        return Change(*_names(new), "same", _shown(old), _shown(new), why=new.reason)
    if new.status != "ok":
        fault = "can't tell" if new.status == "interrupted" else "worse"
        return Change(*_names(new), fault, _shown(old), _shown(new), why=new.reason)
    if old.status != "ok":
        mended = old.status in (*WRONG, *FAILED, "unsupported", "unavailable")
        return Change(*_names(new), "better" if mended else "can't tell", _shown(old), _shown(new))
    if not (_samples(old.timing) and _samples(new.timing)):
        return Change(*_names(new), "can't tell", _shown(old), _shown(new), why="a run has no timed calls of it")
    found = _timed(old, new, new.label, lambda r: r.timing)
    if control and (steps := in_steps(new, old)):
        same = TIMES[verdict(steps, floor(old) + floor(new))] == found.verdict
        return replace(found, in_steps=steps, verdict=found.verdict if same else "can't tell")
    return found


def _timed(old: Record, new: Record, name: str, part: Any) -> Change:  # noqa: ANN401  Record -> its timing
    """Return what became of something both runs timed."""
    before, after = part(old), part(new)
    found = unpaired(_samples(after), _samples(before))
    answer = TIMES[verdict(found, floor(old) + floor(new))]
    changed = old.environment.get("backend_source"), new.environment.get("backend_source")
    edited = name != "ordinary step" and None not in changed and changed[0] != changed[1]
    return Change(
        *(*_names(new)[:2], name),
        verdict=answer,
        old=_median(before),
        new=_median(after),
        ratio=found,
        memory=_memory(old, new) if name != "ordinary step" else None,
        why="its file was changed" if edited else "",
    )


def _gone(record: Record) -> Change:
    return Change(*_names(record), "gone", _shown(record), "")


def floor(record: Record) -> float:
    """Return a record's A/A floor, as |log|; 0 where its run had no baseline."""
    value = record.timing.get("floor")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _shared_keys(old: Sequence[Record], new: Sequence[Record]) -> tuple[str, ...]:
    """Return what both runs' problems say: a version that says more is of the same problem all the same."""
    sides = [set.union(*(set(r.problem) for r in run)) if run else set() for run in (old, new)]
    return tuple(sorted(set.intersection(*sides) - set(PLACE_ONLY)))


def _key(record: Record, shared: Sequence[str]) -> tuple[str, str, str]:
    return str([record.problem.get(key) for key in shared]), record.quantity, record.label


def _names(record: Record) -> tuple[str, str, str]:
    n = batch_of(record)
    return problem_of(record) + (f", N={n}" if n is not None else ""), record.quantity, record.label


def _shown(record: Record) -> float | str:
    """Return the median of a right result, or what became of it."""
    return _median(record.timing) if record.status == "ok" and _samples(record.timing) else record.status


def _samples(timing: Mapping[str, Any]) -> list[float]:
    """Return the raw samples; a record of a version that kept none has its median."""
    samples = timing.get("samples_s") or [timing.get("median_s")]
    return [float(s) for s in samples if isinstance(s, int | float) and s > 0]


def _median(timing: Mapping[str, Any]) -> float:
    return float(np.median(_samples(timing)))


def _step(record: Record) -> Mapping[str, Any]:
    return record.timing.get("ordinary") or {}


def _memory(old: Record, new: Record) -> float | None:
    before, after = old.memory.get("peak_bytes"), new.memory.get("peak_bytes")
    return after / before if before and after else None
