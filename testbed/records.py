"""Records: one for each cell, written as a line of JSON the moment the cell ends."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

SCHEMA = 1  # of a record; a later reader knows by it what an earlier version wrote

STATUSES = {
    "ok": "agrees, and was timed",
    "disagrees": "computes something else",
    "nonfinite": "returns NaN or infinity where the truth is finite",
    "unsupported": "refuses, with a reason",
    "unavailable": "its library is not installed",
    "oom": "out of memory",
    "timeout": "took longer than it may",
    "crash": "its process died",
    "error": "raised an exception",
    "interrupted": "was stopped from outside",
}
WRONG = ("disagrees", "nonfinite")
FAILED = ("oom", "timeout", "crash", "error")

EXIT_OK, EXIT_WRONG, EXIT_USAGE, EXIT_FAILED, EXIT_REGRESSION, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130


@dataclass(frozen=True)
class Record:
    """What is known of one cell: problem × backend(options) × quantity.

    Attributes:
        cell: Identity: a hash of all that could change the numbers.
        experiment: The experiment's name.
        problem: Model, data, loss, batch size, dtype, device, … as plain data.
        backend: The backend's name.
        options: The backend's options, where they were set.
        quantity: What was computed, with its options where they were set.
        status: One of `STATUSES`.
        reason: Why it is not "ok", in one line; empty where it is.
        agreement: Both questions' answers, and the answer after timing.
        diagnosis: What is wrong, in one sentence; empty where nothing is.
        phases: Seconds of import, prepare, first call; and what happened in them: warnings, compilations, `choices`.
        timing: `median_s, p5_s, p95_s, samples_s, ratio, ratio_ci, verdict`, `ordinary` step, `limit`; `native` says
            whether the way is the backend's own or derived from `grads`.
        memory: `peak_bytes` and what it is made of.
        environment: Machine, versions, settings, commit, hash of the backend's source.
    """

    cell: str
    experiment: str
    problem: dict[str, Any]
    backend: str
    options: dict[str, Any]
    quantity: str
    status: str
    reason: str
    agreement: dict[str, Any]
    diagnosis: str
    phases: dict[str, Any]
    timing: dict[str, Any]
    memory: dict[str, Any]
    environment: dict[str, Any]

    @property
    def label(self) -> str:
        """The backend with its options, as tables show it."""
        return with_options(self.backend, self.options)

    def to_json(self) -> str:
        """Return the record as one line of JSON."""
        return as_line(asdict(self))


def as_line(data: Mapping[str, Any]) -> str:
    """Return plain data as one line of JSON."""
    return json.dumps(_jsonable(data), ensure_ascii=False, allow_nan=False)


def with_options(name: str, options: Mapping[str, Any]) -> str:
    """Return a name with its options as tables show it: `opacus(mode=ew)`, `random(shape=[1, 28, 28])`."""
    inside = ", ".join(f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in options.items())
    return f"{name}({inside})" if inside else name


class CannotWrite(Exception):
    """A record cannot be written: the disk is full, say. One line: which file and why, and what is safe."""


class Line(Protocol):
    """What can be written as a line: a `Record`, or what another command finds."""

    def to_json(self) -> str:
        """Return it as one line of JSON."""


class RecordFile:
    """A run folder's `results.jsonl`, say; each record is whole on disk before the next cell starts.

    Args:
        path: The file.
        advice: What to do where it cannot be written.
    """

    def __init__(self, path: Path, advice: str = "free some space and go on with --resume") -> None:
        self.path, self.advice = path, advice

    def append(self, record: Line) -> None:
        """Write one record as a line, and wait until the disk has it.

        Raises:
            CannotWrite: The file is as it was.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab", buffering=0) as file:
                _write(file, (record.to_json() + "\n").encode())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)  # half a line would spoil the file
            saved = f"the records before it are whole; {self.advice}"
            raise CannotWrite(f"{self.path}: cannot be written: {error.strerror}; {saved}") from None

    def replace(self, records: Sequence[Record], dropped: Sequence[Record], into: Path) -> None:
        """Keep these records only; those that are dropped are first appended to another file.

        Raises:
            CannotWrite: The file is as it was.
        """
        for record in dropped:
            RecordFile(into).append(record)
        partial = self.path.with_suffix(".partial")
        try:
            with partial.open("wb", buffering=0) as file:
                _write(file, "".join(record.to_json() + "\n" for record in records).encode())
            partial.replace(self.path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CannotWrite(f"{partial}: cannot be written: {error.strerror}; the records are as they were") from None


def _write(file: FileIO, data: bytes) -> None:
    """Write all of it, and wait until the disk has it."""
    while data:
        data = data[file.write(data) :]
    os.fsync(file.fileno())


def read_records(path: Path) -> list[Record]:
    """Read a `results.jsonl` of this version or another.

    Fields that a later version added are left out, those that an earlier one did not have yet are empty. A last
    line that the writer was killed in is left out.

    Raises:
        ValueError: A line is no record; its number is in the message.
        OSError: The file cannot be read.
    """
    empty: dict[str, Any] = {f.name: "" if f.type is str else {} for f in fields(Record)}
    lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: a text may hold its other line ends
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            data = {name: data[name] for name in empty if data.get(name) is not None}
        except (ValueError, AttributeError):
            if number == len(lines) and number > 1:
                break
            raise ValueError(f"line {number} is no record") from None
        if not {"backend", "status"} <= data.keys() or any(type(v) is not type(empty[k]) for k, v in data.items()):
            raise ValueError(f"line {number} is no record")
        found.append(Record(**empty | data))
    return found


def exit_code(records: Iterable[Record], expect: Mapping[str, str] | None = None) -> int:
    """Return the exit code of a run: what is wrong counts first, then what failed; what was expected does not count."""
    codes = {EXIT_OK}
    for record in records:
        expected = (expect or {}).get(record.label, (expect or {}).get(record.backend))
        if expected is not None:
            codes.add(EXIT_OK if record.status == expected else EXIT_WRONG)
        elif record.status in WRONG:
            codes.add(EXIT_WRONG)
        elif record.status in FAILED:
            codes.add(EXIT_FAILED)
        elif record.status == "interrupted":
            codes.add(EXIT_INTERRUPTED)
    return next(code for code in (EXIT_INTERRUPTED, EXIT_WRONG, EXIT_FAILED, EXIT_OK) if code in codes)


def _jsonable(value: Any) -> Any:  # noqa: ANN401  recursion over plain data
    """Return plain data with numbers that JSON has no word for as text: "nan", "inf"."""
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
