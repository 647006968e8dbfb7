"""A run's folder: `results.jsonl`, the resolved `experiment.yaml`, `environment.json`, `errors.log`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from testbed.environment import environment
from testbed.experiment import Experiment
from testbed.records import Record, RecordFile
from testbed.yaml_source import ConfigError


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; records are whole on disk the moment they are appended."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make the folder.

        Raises:
            ConfigError: It cannot be made, or holds another run.
        """
        results = path / "results.jsonl"
        try:
            path.mkdir(parents=True, exist_ok=True)
            results.touch()
            if results.stat().st_size:  # a run that ended before its first record may be repeated here
                raise ConfigError(f"--out {path}: holds a run already; give another folder")
        except OSError as error:
            raise ConfigError(f"--out {path}: cannot be made: {error.strerror}") from None
        return cls(path)

    def describe(self, experiment: Experiment | None, device: torch.device) -> None:
        """Write what is run, and where; what a command runs without an experiment is in its records."""
        if experiment:
            (self.path / "experiment.yaml").write_text(experiment.to_yaml(), encoding="utf-8")
        about = json.dumps(environment(device), indent=2, ensure_ascii=False)
        (self.path / "environment.json").write_text(about + "\n", encoding="utf-8")

    def append(self, record: Record, traceback: str = "") -> None:
        """Write one record, and the traceback of a cell that raised."""
        RecordFile(self.path / "results.jsonl").append(record)
        if traceback:
            with (self.path / "errors.log").open("a", encoding="utf-8") as file:
                file.write(f"{record.label}, {record.quantity}\n{traceback}\n")
