"""What the tests of bookkeeping share: models with habits, and how their passes are run."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from backends import get_backend
from backends.base import own_copy
from backends.batch import Batch
from backends.ops.passes import Passes
from backends.ops.persample import PerSample
from backends.ops.ways import Ways
from tests.asserts import assert_close
from tests.cases import DEVICE, Functional, linear, squares


def assert_right(model: nn.Module, inputs: Batch, targets: Tensor) -> None:
    """Hold the backend's gradients and norms against the loop's."""
    for quantity in ("grads", "norms"):
        ours, loop = (getattr(get_backend(name), quantity)(model, squares) for name in ("bookkeeping", "naive"))
        assert_close(ours(inputs, targets), loop(inputs, targets))


def itself(name: str, g: PerSample) -> PerSample:
    return g


def differentiated_directly(model: nn.Module, inputs: Tensor, targets: Tensor) -> set[str]:
    """Return the parameters that were used outside of rules under vmap."""
    passes, found = Passes(own_copy(model), squares), []
    backward = passes._backward
    passes._backward = lambda *args: found.append(backward(*args)) or found[-1]  # type: ignore[func-returns-value, method-assign]
    passes.under_vmap(True).run(inputs, targets, itself)
    return set(found[-1][0])


def way_of(model: nn.Module, inputs: Batch, targets: Tensor) -> str:
    """Return how the passes are run."""
    passes = Ways(Passes(own_copy(model), squares))
    passes(inputs, targets, itself)
    ((way, *_),) = passes.known.values()
    return way.name


def over_the_batch(model: nn.Module, inputs: Batch, targets: Tensor) -> bool:
    """Return whether the passes are an ordinary step's."""
    return way_of(model, inputs, targets) == "over the batch"


def habit(forward: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    model = Functional(forward, a=linear(5, 5), b=linear(5, 5), m=nn.MultiheadAttention(5, 1, batch_first=True))
    model.kept = [model.a.weight]
    return model.to(DEVICE, torch.float64)


def by_its_values(s: nn.Module, x: Tensor) -> Tensor:
    """Go on for as long as a value says: of a batch, for as long as the first sample's says."""
    for _ in range(3 if float(x.flatten()[0].detach()) > 0 else 1):
        x = s.a(x).sin()
    return x
