"""Run folders → runs: their records, whatever version wrote them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from testbed.config.experiment import Published
from testbed.config.yaml_source import ConfigError, read
from testbed.records import Record, read_records


@dataclass(frozen=True)
class Run:
    """A run's records under a name.

    Attributes:
        name: What the page calls it: the folder's name.
        records: One for each cell; of a cell that was run again, the last.
        published: What publications say of such cells; the experiment names them.
        size: The size of the experiment, where it has several.
    """

    name: str
    records: tuple[Record, ...]
    published: tuple[Published, ...] = ()
    size: str | None = None


def load_run(path: Path) -> Run:
    """Read a run's folder, or its `results.jsonl`.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    file = path / "results.jsonl" if path.is_dir() else path
    if not file.exists():
        what = (
            "holds no results.jsonl, so it is no run's folder" if path.is_dir() else "there is no such file or folder"
        )
        raise ConfigError(f"{path}: {what}")
    try:
        records = read_records(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # of JSON, of the encoding
        raise ConfigError(f"{file}: {error}; this should be a run's results.jsonl") from None
    if not records:
        raise ConfigError(f"{file}: holds no record")
    if file.name == "results.jsonl":
        return run_of(records, file.parent)
    return Run(file.stem, last_of_each(records))


def run_of(records: Sequence[Record], folder: Path) -> Run:
    """Return the run of these records in a folder, whose `experiment.yaml` says what is published, if it is there."""
    try:
        found = read(folder / "experiment.yaml").data
        published = tuple(Published.model_validate(entry) for entry in found.get("published") or ())
        return Run(folder.resolve().name, last_of_each(records), published, found.get("size"))
    except (ConfigError, ValidationError, AttributeError, TypeError):  # no such file, or of another version
        return Run(folder.resolve().name, last_of_each(records))


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several runs; those whose folders have the same name are told apart by a number."""
    runs: list[Run] = []
    for run in map(load_run, paths):
        same = sum(other.name == run.name or other.name.startswith(f"{run.name} (") for other in runs)
        runs.append(replace(run, name=f"{run.name} ({same + 1})") if same else run)
    return runs


def last_of_each(records: Sequence[Record]) -> tuple[Record, ...]:
    """Return the records without those of cells that were run again later."""
    last = {cell_of(record): record for record in records}
    return tuple(last.values())


def cell_of(record: Record) -> tuple[str, str, str]:
    """Return what a record is of, in words: two records of one cell are equal in it, whatever the code's version."""
    return str(sorted(record.problem.items(), key=str)), record.quantity, record.label
