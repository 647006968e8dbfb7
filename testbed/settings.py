"""How cells are run, and what a record of one says of its surroundings: both are part of its identity."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from testbed.agreement import Rule
from testbed.cell import Cell, identity, source_hash
from testbed.environment import environment
from testbed.processes.child import Isolation
from testbed.records import SCHEMA


@dataclass(frozen=True)
class Settings:
    """How to run cells: everything that is not problem, backend or quantity.

    Attributes:
        experiment: The experiment's name, for the records.
        rule: When a result agrees.
        rounds: Timing rounds at most.
        max_s: Seconds for the rounds of a quantity.
        warmup: Untimed calls after the first one.
        precision: Half the width of a ratio's interval, relative to it, that is narrow enough to stop; 0 never is.
        baseline: The backend that times are divided by; the reference if None.
        seed: Seeds the order within rounds.
    """

    experiment: str
    rule: Rule
    rounds: int
    max_s: float
    warmup: int
    precision: float
    baseline: str | None
    seed: int


def identify(cell: Cell, about: Mapping[str, Any], settings: Settings, isolation: Isolation | None) -> str:
    """Return the identity of a cell that is run here and now: a record that bears it need not be made again."""
    return identity(cell, about, vars(settings), surroundings(cell, about, isolation))


def surroundings(cell: Cell, about: Mapping[str, Any], isolation: Isolation | None) -> dict[str, Any]:
    """Return what the record of a cell says of its surroundings."""
    found = {**environment(torch.device(about["device"])), "backend_source": source_hash(cell.backend)}
    found |= {"schema": SCHEMA, "processes": "one a backend" if isolation else "one"}
    if isolation:
        found["limits"] = {"timeout_s": isolation.timeout_s, "memory_gb": isolation.memory_gb}
    return found
