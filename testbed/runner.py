"""Problem × cells → records: one quantity after the other, each in its hosts."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch

from backends.base import Unsupported
from testbed.cell import Cell
from testbed.group import Emit, Group
from testbed.outcome import Outcome
from testbed.processes.child import Isolation, on_device
from testbed.processes.host import Failed, Make, Setup
from testbed.processes.hosts import HOUSE, Children, Hosts, InProcess
from testbed.progress import Progress, Silent
from testbed.settings import Settings

INTERRUPTED = Outcome(status="interrupted", reason="stopped by Ctrl-C or a signal")


def run(
    make: Make,
    about: Mapping[str, Any],
    cells: Sequence[Cell],
    settings: Settings,
    emit: Emit,
    progress: Progress | None = None,
    isolation: Isolation | None = None,
    finished: Container[str] = (),
    instead: Outcome | None = None,
) -> None:
    """Run cells on a problem; each becomes one record, whatever happens to it.

    Args:
        make: Makes the problem; it may take long, so it is part of the run.
        about: What the records say of the problem, as plain data; `device` is where it is.
        cells: The cells, in the order of the table.
        settings: How to run them.
        emit: Takes each record.
        progress: Hears what is going on.
        isolation: What the children may take that run the cells; None runs all in this process.
        finished: Identities (see `identify`) of cells that have their record already.
        instead: What becomes of all cells that are not finished, in place of a run.

    Raises:
        ProblemError: The problem cannot be made.
        KeyboardInterrupt: Again, after what was measured so far has been emitted.
    """
    progress = progress or Silent()
    by_quantity: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        by_quantity.setdefault((cell.quantity, str(dict(cell.quantity_options))), []).append(cell)
    found = [Group(dict(about), group, settings, emit, progress, isolation, finished) for group in by_quantity.values()]
    groups = [group for group in found if group.running]
    if instead:
        _end(groups, instead)
    if instead or not groups:
        return
    setup = Setup(make, settings.seed, settings.rule)
    labels = [label for group in groups for label in group.labels()]
    try:
        with _hosts(setup, isolation, torch.device(about["device"]), labels) as hosts:
            progress.begin("problem", 2)
            progress.step("data, model, training")
            facts = hosts[HOUSE].make()
            for group in groups:
                group.about |= facts
            progress.step("does every sample have a gradient of its own?")
            hosts[HOUSE].check()
            hosts.settle()
            for group in groups:
                group.run(hosts)
    except Unsupported as error:
        _end(groups, refused(error))
    except Failed as failed:
        _end(groups, Outcome(failed.status, f"the problem: {failed.reason}", traceback=failed.details))
    except KeyboardInterrupt:
        _end(groups, INTERRUPTED)
        raise


def refused(error: Exception) -> Outcome:
    """Return what becomes of the cells of a problem that is refused."""
    return Outcome(status="unsupported", reason=f"the problem: {error}")


def _end(groups: Sequence[Group], outcome: Outcome) -> None:
    for group in groups:
        group.end_all(outcome)


def _hosts(setup: Setup, isolation: Isolation | None, device: torch.device, labels: Sequence[str]) -> Hosts:
    return Children(setup, on_device(isolation, device), labels) if isolation else InProcess(setup)
