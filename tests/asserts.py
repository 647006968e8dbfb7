"""Named properties, asserted with a message that says which part of the contract is broken."""

from collections.abc import Mapping

import torch
from torch import Tensor

from backends.base import trainable
from backends.batch import size
from tests.cases import Case

CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # float64 rounding on these small problems is below 1e-13


def assert_close(result: Tensor | Mapping[str, Tensor], truth: Tensor | Mapping[str, Tensor]) -> None:
    torch.testing.assert_close(result, truth, **CLOSE)


def assert_form(grads: Mapping[str, Tensor], case: Case) -> None:
    """Names, shapes, dtypes and devices are those of the contract; nothing owns a graph."""
    parameters = trainable(case.model)
    assert list(grads) == list(parameters)
    for name, p in parameters.items():
        g = grads[name]
        assert (g.shape, g.dtype, g.device) == ((size(case.inputs), *p.shape), p.dtype, p.device), name
        assert not g.requires_grad, name
        assert g.grad_fn is None, name
