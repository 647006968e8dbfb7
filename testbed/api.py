"""The Python API: compare backends on a model of your own."""

import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from backends import available
from backends.base import BACKENDS, QUANTITIES, Backend, LossFn
from backends.batch import Batch, apply, size, take
from backends.registry import BadOption, UnknownName, check_options, explain, unknown
from testbed.agreement import RULES, Rule
from testbed.cell import Cell
from testbed.config.experiment import Choice, Combination, Experiment, Timing, Workload
from testbed.environment import source_of
from testbed.group import Emit
from testbed.problems import DATA, LOSSES, MODELS, Problem, ProblemError, make_problem
from testbed.processes.child import Isolation
from testbed.progress import Progress
from testbed.records import Record
from testbed.report import Report
from testbed.runner import INTERRUPTED, leave_out, refused, run
from testbed.settings import Settings, identify

Chosen = str | Mapping[str, Mapping[str, Any]]
"""A name, or {name: {option: value}}, as in YAML."""


def compare(
    model: nn.Module,
    loss_fn: LossFn,
    inputs: Batch,
    targets: Tensor,
    backends: Sequence[Chosen] | None = None,
    quantities: Sequence[Chosen] = ("grads",),
    *,
    fresh: tuple[Batch, Tensor] | None = None,
    baseline: str | None = None,
    agreement: Chosen = "calibrated",
    rounds: int = 10,
    max_s: float = 20.0,
    warmup: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Check backends against each other on your model, and time them.

    Args:
        model: Your model, on the device and in the dtype to compare in; it is left as it is.
        loss_fn: (outputs, targets) -> losses [N], one loss a sample: `reduction='none'`.
        inputs: A tensor [N, ...], or a tuple or dict of them.
        targets: [N, ...].
        backends: Names, or {name: {option: value}}; all if None.
        quantities: Of "grads", "norms", "clipped_sum", "variance", "gram"; {"clipped_sum": {"max_norm": 0.5}} too.
        fresh: A second batch for the check after timing; the same one in reverse order if None.
        baseline: The backend that times are divided by; the reference if None.
        agreement: The rule: "calibrated", or {"allclose": {"atol": …, "rtol": …}}.
        rounds: Timing rounds at most.
        max_s: Seconds for the rounds of a quantity.
        warmup: Untimed calls after the first one.
        seed: Seeds the order within rounds.
        progress: Hears what is going on.

    Returns:
        A report that prints as a table, shows as HTML in a notebook, and holds the records.

    Raises:
        UnknownName: Of a backend, quantity or rule.
        BadOption: Of one of them.
        TypeError: Model or loss are not what they should be.
        ValueError: Inputs and targets are no batch, or a number is out of range.
    """
    check_arguments(model, loss_fn, inputs, targets)
    if fresh is not None and not (isinstance(fresh, tuple) and len(fresh) == 2):
        raise TypeError(f"fresh should be a pair (inputs, targets), found {type(fresh).__name__}")
    if fresh is not None:
        _check_batch("fresh[0]", fresh[0])
        _check_targets("fresh[1]", fresh[1])
        if size(fresh[0]) != size(fresh[1]):
            lengths = f"{size(fresh[0])} and {size(fresh[1])}"
            raise ValueError(f"fresh should hold as many targets as inputs, found {lengths}")
    inputs, targets = apply(torch.Tensor.detach, inputs), targets.detach()
    backends = [backends] if isinstance(backends, str) else backends
    quantities = [quantities] if isinstance(quantities, str) else quantities
    for asked, found in (("backends", backends), ("quantities", quantities)):
        if found is not None and not found:
            raise ValueError(f"{asked} should name at least one, found none")
    backwards = torch.arange(size(inputs) - 1, -1, -1, device="cpu")
    fresh_inputs, fresh_targets = fresh if fresh is not None else (take(inputs, backwards), take(targets, backwards))
    problem = Problem(model, loss_fn, inputs, targets, fresh_inputs, fresh_targets)
    try:
        timing = Timing(rounds=rounds, max_s=max_s, warmup=warmup)
        chosen = [Choice.model_validate(b) for b in (available() if backends is None else backends)]
        wanted = [Choice.model_validate(q) for q in quantities]
        judged = rule(Choice.model_validate(agreement))
    except ValidationError as error:
        raise BadOption(explain(error.errors()[0]).removeprefix("'': ")) from None
    said = {
        "model": type(model).__name__,
        "loss": getattr(loss_fn, "__name__", type(loss_fn).__name__),
        "batch_size": problem.n,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "device": str(problem.device),
    }
    if baseline is not None and baseline not in [choice.name for choice in chosen]:
        raise UnknownName(unknown("baseline", baseline, [choice.name for choice in chosen]))
    how = Settings("compare", judged, **timing.model_dump(), baseline=baseline, seed=seed)
    records: list[Record] = []
    run(lambda: problem, said, cells(chosen, wanted), how, lambda record, _: records.append(record), progress)
    return Report(records)


def check_arguments(model: nn.Module, loss_fn: LossFn, inputs: Batch, targets: Tensor) -> None:
    """Refuse what cannot be a problem, before anything is built.

    Raises:
        TypeError: The model is no module, or the loss cannot be called.
        ValueError: There is no sample, inputs and targets do not match, or the model holds no numbers.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model should be a torch.nn.Module (not a script), found {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn should be a function (outputs, targets) -> losses [N], found {type(loss_fn).__name__}"
        )
    _check_batch("inputs", inputs)
    _check_targets("targets", targets)
    if size(inputs) != size(targets):
        raise ValueError(f"inputs and targets should hold as many samples, found {size(inputs)} and {size(targets)}")
    parameters = list(model.parameters())
    if any(is_lazy(p) or p.is_meta for p in parameters):
        raise ValueError("the model has parameters without values (meta device or lazy module); initialise it first")
    if not any(p.is_floating_point() or p.is_complex() for p in parameters):
        raise ValueError("the model has no floating-point parameter: nothing to differentiate")


def _check_batch(name: str, batch: object) -> None:
    """Refuse a batch that holds something else than tensors, by its place; what is no batch at all is for `size`."""
    if isinstance(batch, Tensor | str) or not isinstance(batch, Mapping | Sequence):
        return
    for key, value in batch.items() if isinstance(batch, Mapping) else enumerate(batch):
        if not isinstance(value, Tensor):
            found = f"{name}[{key!r}] should be a tensor [N, ...], found {type(value).__name__}"
            raise ValueError(f"{found}; what belongs to no sample goes into a module around the model")


def _check_targets(name: str, targets: object) -> None:
    if not isinstance(targets, Tensor):
        raise ValueError(f"{name} should be one tensor [N, ...], found {type(targets).__name__}")


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
        arguments = (job.about, job.cells, job.settings, emit)
        if stopped:
            leave_out(INTERRUPTED, *arguments, isolation, finished)
            continue
        try:
            run(partial(_make, job.problem, device), *arguments, progress, isolation, finished)
        except KeyboardInterrupt:
            stopped = True
        except ProblemError as error:
            if len(found) == 1:
                raise
            failed.append(error)
            leave_out(refused(error), *arguments, isolation, finished)
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
