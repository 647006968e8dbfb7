"""What a problem is, and how one is made from names and options."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from backends.base import LossFn, first_line, full_copy, place_of
from backends.batch import Batch, apply, call, cast, size
from testbed.problems.factories import Factories

Positive = Annotated[int, Field(gt=0)]
"""An option that is a positive whole number."""


class ProblemError(Exception):
    """A problem that cannot be made, or has no per-sample gradient: one line that says why and what to do."""


class Samples(NamedTuple):
    """N samples of some data.

    Attributes:
        inputs: A tensor, or a tuple or dict of tensors, each [N, ...].
        targets: [N, ...].
        outputs: How many numbers a model returns for a sample: classes, or dimensions of a regression.
    """

    inputs: Batch
    targets: Tensor
    outputs: int


ModelFactory: TypeAlias = Callable[..., nn.Module]
"""(example: Samples, *, options) -> model, with random weights from torch's global generator, which is seeded."""

DataFactory: TypeAlias = Callable[..., Samples]
"""(n: int, *, options) -> n samples, drawn with torch's global generator, which is seeded."""

MODELS: Factories[ModelFactory] = Factories("model", "example")
DATA: Factories[DataFactory] = Factories("data", "n")
LOSSES: Factories[Callable[..., Tensor]] = Factories("loss", "outputs", "targets")

register_model = MODELS.register
register_data = DATA.register
register_loss = LOSSES.register


@dataclass(frozen=True)
class Problem:
    """A model, its loss, a batch, and a second batch that the first one says nothing about.

    Attributes:
        model: On the device and in the dtype that the problem is run in.
        loss_fn: (outputs, targets) -> losses [N].
        inputs: The batch, [N, ...].
        targets: Its targets, [N, ...].
        fresh_inputs: A batch of the same form, for the check after timing.
        fresh_targets: Its targets.
    """

    model: nn.Module
    loss_fn: LossFn
    inputs: Batch
    targets: Tensor
    fresh_inputs: Batch
    fresh_targets: Tensor

    @property
    def n(self) -> int:
        """The number of samples N."""
        return size(self.inputs)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's floating-point parameters."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def to(self, dtype: torch.dtype) -> "Problem":
        """Return the same problem in another floating-point dtype: model, loss and both batches."""
        return replace(
            self,
            model=full_copy(self.model).to(dtype=dtype),
            loss_fn=_convert_loss(self.loss_fn, dtype),
            inputs=cast(self.inputs, dtype),
            targets=cast(self.targets, dtype),
            fresh_inputs=cast(self.fresh_inputs, dtype),
            fresh_targets=cast(self.fresh_targets, dtype),
        )


def _convert_loss(loss_fn: LossFn, dtype: torch.dtype) -> LossFn:
    """Return the loss with the tensors it holds (class weights, say) in `dtype`: a module, or a partial's keywords."""
    if isinstance(loss_fn, nn.Module):
        return copy.deepcopy(loss_fn).to(dtype=dtype)
    if isinstance(loss_fn, partial):
        held = {k: cast(v, dtype) if isinstance(v, Tensor) else v for k, v in loss_fn.keywords.items()}
        return partial(_convert_loss(loss_fn.func, dtype), *loss_fn.args, **held)
    return loss_fn


def make_problem(
    model: str,
    data: str,
    loss: str,
    *,
    model_options: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
    loss_options: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    train_steps: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Problem:
    """Make a problem from registered names; the same arguments give the same problem, bit for bit on one machine.

    Args:
        model: A registered model.
        data: Registered data.
        loss: A registered loss.
        model_options: The model's options.
        data_options: The data's options.
        loss_options: The loss's options.
        batch_size: N.
        seed: Seeds data and weights; the global random state is left as it was.
        train_steps: Steps of Adam (learning rate 1e-3) on further samples, since random weights hide problems.
        dtype: Of weights and floating-point inputs; they are made and trained in float32.
        device: Where the problem is put; it is made on the CPU, so that every device gets the same one.

    Raises:
        UnknownName: Of a model, data or loss.
        BadOption: Of one of them.
        ProblemError: The data cannot be had, or model and data do not fit.
    """
    chosen = [DATA.check(data, data_options or {}), MODELS.check(model, model_options or {})]
    loss_fn: LossFn = LOSSES[loss]
    if options := LOSSES.check(loss, loss_options or {}):
        loss_fn = partial(loss_fn, **options)

    def draw() -> Samples:
        with _blaming(f"data '{data}' cannot be made: {batch_size} samples", chosen[0]):
            samples: Samples = DATA[data](batch_size, **chosen[0])
            if (n := size(samples.inputs)) != batch_size:
                raise ValueError(f"it returned {n}")
            return samples

    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # everything is made on the CPU
        torch.default_generator.manual_seed(seed)
        batch = draw()
        with _blaming(f"model '{model}' cannot be made", chosen[1]):
            network: object = MODELS[model](batch, **chosen[1])
        if not isinstance(network, nn.Module):
            raise ProblemError(f"model '{model}' returned {a_thing(network)}, not a torch.nn.Module")
        fresh = draw()
        with _blaming(f"model '{model}' cannot be trained on '{data}' with loss '{loss}'", {}):
            _train(network, loss_fn, draw, train_steps)
    problem = Problem(network, loss_fn, batch.inputs, batch.targets, fresh.inputs, fresh.targets)
    return put(problem if dtype == torch.float32 else problem.to(dtype), torch.device(device))


def a_thing(found: object) -> str:
    """Return what a function returned by mistake, in words: "an int"."""
    kind = type(found).__name__
    return "nothing" if found is None else f"a{'n' if kind[0].lower() in 'aeiou' else ''} {kind}"


@contextmanager
def _blaming(what: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Turn what a factory raises into one line that names it, its options and the place."""
    try:
        yield
    except (ProblemError, KeyboardInterrupt):
        raise
    except Exception as error:
        shown = f" with {dict(options)}" if options else ""
        raise ProblemError(f"{what}{shown}: {type(error).__name__}: {first_line(error)} ({place_of(error)})") from error


def _train(model: nn.Module, loss_fn: LossFn, draw: Callable[[], Samples], steps: int) -> None:
    if not steps:
        return  # PyTorch's optimizers load its compiler, which takes a second
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        samples = draw()
        optimizer.zero_grad()
        torch.autograd.backward(loss_fn(call(model, samples.inputs), samples.targets).mean())
        optimizer.step()
    model.zero_grad(set_to_none=True)


def put(problem: Problem, device: torch.device) -> Problem:
    """Return the problem on a device, where its model and a loss that is a module are moved to."""
    loss_fn = problem.loss_fn
    return replace(
        problem,
        model=problem.model.to(device),
        loss_fn=loss_fn.to(device) if isinstance(loss_fn, nn.Module) else loss_fn,
        inputs=apply(lambda t: t.to(device), problem.inputs),
        targets=problem.targets.to(device),
        fresh_inputs=apply(lambda t: t.to(device), problem.fresh_inputs),
        fresh_targets=problem.fresh_targets.to(device),
    )
