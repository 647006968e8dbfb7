"""An experiment, problem by problem: what `run` is given for each, and what records are known by."""

import inspect
from collections.abc import Callable, Container, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from backends import available
from backends.base import BACKENDS, QUANTITIES, Backend
from backends.registry import UnknownName, check_options, unknown
from testbed.agreement import RULES, Rule
from testbed.cell import Cell
from testbed.config.experiment import Choice, Combination, Experiment, Workload
from testbed.environment import source_of
from testbed.group import Emit
from testbed.problems import DATA, LOSSES, MODELS, Problem, ProblemError, make_problem
from testbed.processes.child import Isolation
from testbed.progress import Progress
from testbed.runner import INTERRUPTED, refused, run
from testbed.settings import Settings, identify


def run_experiment(
    experiment: Experiment,
    name: str,
    device: torch.device,
    emit: Emit,
    progress: Progress | None = None,
    isolation: Isolation | None = None,
    finished: Container[str] = (),
) -> None:
    """Run an experiment, problem by problem; each record is given to `emit` the moment its cell ends.

    Of several problems, one that cannot be made costs the others nothing: its cells are `unsupported`.

    Args:
        experiment: What to run.
        name: Its name, for the records.
        device: Where.
        emit: Takes each record.
        progress: Hears what is going on.
        isolation: What the children may take that run the cells; None runs all in this process.
        finished: Identities of cells that have their record already.

    Raises:
        ProblemError: A problem cannot be made; where there are several, after the others have been run.
        KeyboardInterrupt: Again, after what was measured so far has been emitted, and `interrupted` for the rest.
    """
    found = jobs(experiment, name, device)
    failed: list[ProblemError] = []
    stopped = False
    for count, job in enumerate(found, 1):
        if progress and len(found) > 1 and not stopped:
            progress.begin(f"problem {count} of {len(found)}: {job.problem}", 0)
        set_precision(job.problem)
        make = partial(_make, job.problem, device)
        arguments = (make, job.about, job.cells, job.settings, emit, progress, isolation, finished)
        try:
            run(*arguments, instead=INTERRUPTED if stopped else None)
        except KeyboardInterrupt:
            stopped = True
        except ProblemError as error:
            if len(found) == 1:
                raise
            failed.append(error)
            run(*arguments, instead=refused(error))
    if stopped:
        raise KeyboardInterrupt
    if failed:
        raise failed[0]


class Job(NamedTuple):
    """What an experiment runs on one problem: the arguments of `run`."""

    problem: Workload
    about: dict[str, Any]
    cells: list[Cell]
    settings: Settings


def jobs(experiment: Experiment, name: str, device: torch.device) -> list[Job]:
    """Return what an experiment runs, problem by problem; a problem whose cells are all excluded is left out."""
    by_problem: dict[str, list[Combination]] = {}
    for combination in experiment.chosen():
        by_problem.setdefault(repr(combination.problem), []).append(combination)
    return [
        Job(
            group[0].problem,
            about_problem(group[0].problem, device),
            [Cell(c.backend.name, c.quantity.name, c.backend.options, c.quantity.options) for c in group],
            settings(experiment, group[0].problem, name),
        )
        for group in by_problem.values()
    ]


def identities(experiment: Experiment, device: torch.device, isolation: Isolation | None) -> list[str]:
    """Return the identities of an experiment's cells, as they would be run here and now, in the order of the table."""
    found = []
    for job in jobs(experiment, "", device):
        set_precision(job.problem)
        found += [identify(cell, job.about, job.settings, isolation) for cell in job.cells]
    return found


def isolated(experiment: Experiment, plugins: Sequence[str] = ()) -> Isolation:
    """Return what an experiment lets the children take that run its cells, and what they load first."""
    return Isolation(**experiment.limits.model_dump(), plugins=tuple(str(Path(file).resolve()) for file in plugins))


def about_problem(problem: Workload, device: torch.device) -> dict[str, Any]:
    """Return what records say of a problem."""
    p = problem
    named = {key: str(getattr(p, key)) for key in ("model", "data", "loss")}
    return {
        **named,
        "batch_size": p.batch_size,
        "seed": p.seed,
        "train_steps": p.train_steps,
        "dtype": p.dtype,
        "device": str(device),
        "tf32": p.tf32,
        "source": source_of(*_files(MODELS[p.model.name], DATA[p.data.name], LOSSES[p.loss.name])),
    }


def _files(*things: Callable[..., Any]) -> list[Path]:
    """Return the files in which functions or classes are defined; what was typed into an interpreter has none."""
    found = [inspect.getsourcefile(thing) for thing in things]
    return [Path(file) for file in found if file and Path(file).is_file()]


def settings(e: Experiment, problem: Workload, name: str) -> Settings:
    """Return how an experiment's cells on a problem are run."""
    seed = problem.seed
    return Settings(name, rule(e.agreement), **e.timing.model_dump(), baseline=e.resolved_baseline(), seed=seed)


def _make(problem: Workload, device: torch.device) -> Problem:
    set_precision(problem)  # a child has switches of its own
    return problem_of(problem, device)


def problem_of(problem: Workload, device: torch.device) -> Problem:
    """Make the problem that an experiment asks for; see `make_problem`."""
    p = problem
    return make_problem(
        p.model.name,
        p.data.name,
        p.loss.name,
        model_options=p.model.options,
        data_options=p.data.options,
        loss_options=p.loss.options,
        batch_size=p.batch_size,
        seed=p.seed,
        train_steps=p.train_steps,
        dtype=getattr(torch, p.dtype),
        device=device,
    )


def set_precision(problem: Workload) -> None:
    """Set PyTorch's global TF32 switches as the problem asks for; the recorded environment shows them."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = problem.tf32


def cells(backends: Sequence[Choice], quantities: Sequence[Choice]) -> list[Cell]:
    """Return the cells of backends × quantities, names and options checked."""
    available()  # discovery fills the registry
    for choice in backends:
        BACKENDS.check(choice.name, choice.options)
    for choice in quantities:
        if choice.name not in QUANTITIES:
            raise UnknownName(unknown("quantity", choice.name, QUANTITIES))
        check_options("quantity", choice.name, getattr(Backend, choice.name), choice.options)
    return [Cell(b.name, q.name, b.options, q.options) for q in quantities for b in backends]


def rule(choice: Choice) -> Rule:
    """Return the agreement rule of a name and options."""
    return RULES[choice.name](**RULES.check(choice.name, choice.options))
