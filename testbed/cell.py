"""A cell: problem × backend(options) × quantity(options), as plain data."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends import backend_class
from testbed.records import with_options


@dataclass(frozen=True)
class Cell:
    """What to run: names and options, nothing that lives.

    Attributes:
        backend: The backend's name.
        quantity: The quantity's name.
        options: The backend's options, where they are set.
        quantity_options: The quantity's options, where they are set.
    """

    backend: str
    quantity: str
    options: Mapping[str, Any] = field(default_factory=dict)
    quantity_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The backend with its options, unique among the cells of one quantity."""
        return with_options(self.backend, self.options)


def source_hash(backend: str) -> str:
    """Return a hash of the file that the backend's class stands in; what was typed into an interpreter has none."""
    try:
        file = Path(inspect.getsourcefile(backend_class(backend)) or "")
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except (OSError, TypeError):
        return "unknown"


def identity(
    cell: Cell, problem: Mapping[str, Any], settings: Mapping[str, Any], environment: Mapping[str, Any]
) -> str:
    """Return the cell's identity: a hash of everything that could change its numbers.

    That is the problem, the cell, how it is measured, code (`source`, `backend_source`, the problem's own `source`,
    `commit`, `dirty`) and machine. The experiment's name, the limits and a GPU's momentary clocks change none.
    """
    everything = [
        cell.backend,
        dict(cell.options),
        cell.quantity,
        dict(cell.quantity_options),
        problem,
        {key: value for key, value in settings.items() if key != "experiment"},
        {key: _without_clocks(value) for key, value in environment.items() if key != "limits"},
    ]
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _without_clocks(value: object) -> object:
    """Return a part of the environment without the GPU's momentary clocks, which differ from run to run."""
    return {k: v for k, v in value.items() if k != "clocks"} if isinstance(value, dict) else value
