"""The Python API: compare backends on a model of your own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from backends import available
from backends.base import LossFn
from backends.batch import Batch, apply, size, take
from backends.registry import BadOption, UnknownName, explain, unknown
from testbed.config.experiment import Choice, Timing
from testbed.jobs import cells, rule
from testbed.problems import Problem
from testbed.progress import Progress
from testbed.records import Record
from testbed.report import Report
from testbed.runner import run
from testbed.settings import Settings

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
