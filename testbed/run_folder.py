"""A run's folder: `results.jsonl`, the resolved `experiment.yaml`, `environment.json`, `errors.log`."""

import json
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from filelock import FileLock, Timeout

from testbed.config.experiment import Experiment
from testbed.config.yaml_source import ConfigError
from testbed.environment import environment
from testbed.records import FAILED, Record, RecordFile, read_records

LIMITED = ("timeout", "oom")  # statuses that another limit may change
LOCK = ".lock"
RESULTS = "results.jsonl"
ERRORS = "errors.log"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; records are whole on disk the moment they are appended.

    Attributes:
        path: Where it is.
        lock: Held while this process writes there; the system lets go of it when the process ends, however that is.
    """

    path: Path
    lock: FileLock = field(repr=False, compare=False)

    @classmethod
    def create(cls, path: Path, holds: str = RESULTS, *, go_on: str = "") -> Self:
        """Make the folder.

        Args:
            path: Where.
            holds: The file that will hold its records.
            go_on: The option that goes on with a run that is there, where the command has one.

        Raises:
            ConfigError: It cannot be made, or holds another run.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _locked(path, "--out")
            (path / holds).touch()
            for file in {path / holds, *path.glob("*.jsonl")}:
                if file.stat().st_size:  # a run that ended before its first record may be repeated here
                    resume = f", or go on with {go_on}" if go_on and file.name == holds else ""
                    raise ConfigError(f"--out {path}: holds a run already; give another folder{resume}")
        except OSError as error:
            raise ConfigError(f"--out {path}: cannot be made: {error.strerror}") from None
        return cls(path, lock)

    @classmethod
    def resume(cls, path: Path) -> Self:
        """Open the folder of a run that ended early.

        Raises:
            ConfigError: There is none, or another process writes there.
        """
        if not (path / "results.jsonl").is_file():
            raise ConfigError(f"--resume {path}: holds no run (no results.jsonl)")
        return cls(path, _locked(path, "--resume"))

    def keep(
        self, wanted: Container[str], limits: dict[str, Any], *, retry_failed: bool = False
    ) -> tuple[list[Record], int]:
        """Keep the records that are wanted; return them, and how many others went to `superseded.jsonl`.

        Args:
            wanted: The identities of the cells to run: a record of other code, another configuration or another
                machine has none of them.
            limits: What children may take now; what failed for other limits is run again.
            retry_failed: Run again what has failed, whatever the reason.

        Raises:
            ConfigError: A line is no record.
            CannotWrite: The disk is full.
        """
        file = self.path / "results.jsonl"
        try:
            records = read_records(file)
        except ValueError as error:
            raise ConfigError(f"--resume {self.path}: results.jsonl: {error}") from None

        def stands(record: Record) -> bool:
            if record.cell not in wanted or record.status == "interrupted":
                return False
            other_limits = record.status in LIMITED and record.environment.get("limits") != limits
            return not other_limits and not (retry_failed and record.status in FAILED)

        kept = list({record.cell: record for record in records if stands(record)}.values())
        dropped = [record for record in records if not stands(record)]
        RecordFile(file).replace(kept, dropped, self.path / "superseded.jsonl")
        return kept, len(dropped)

    def describe(self, experiment: Experiment | None, device: torch.device) -> None:
        """Write what is run, and where; what a command runs without an experiment is in its records."""
        if experiment:
            (self.path / "experiment.yaml").write_text(experiment.to_yaml(), encoding="utf-8")
        about = json.dumps(environment(device), indent=2, ensure_ascii=False)
        (self.path / "environment.json").write_text(about + "\n", encoding="utf-8")

    def append(self, record: Record, traceback: str = "") -> None:
        """Write one record, and what is known beyond it of a cell that failed: a traceback, its last output.

        Raises:
            CannotWrite: The disk is full; the records before it are whole.
        """
        RecordFile(self.path / "results.jsonl").append(record)
        if traceback:
            with suppress(OSError), (self.path / ERRORS).open("a", encoding="utf-8") as file:
                file.write(f"{record.label}, {record.quantity}\n{traceback}\n")


def _locked(path: Path, option: str) -> FileLock:
    """Return the lock of a folder, taken.

    Raises:
        ConfigError: Another process has it.
    """
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{option} {path}: another run is writing there; give another folder") from None
    return lock
