"""The generator of conformance cases: complete, repeatable, and true where `naive` can tell the truth."""

from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from backends import get_backend
from backends.base import Unsupported, trainable
from backends.batch import call, tensors
from backends.running import batch_gradient
from testbed.conformance.case import Case
from testbed.conformance.layers import layer_cases
from testbed.conformance.models import model_cases
from tests.uncovered import parametrised_layers, uncovered

CASES = layer_cases() + model_cases()

# Where a sample has no gradient of its own: the samples' gradients need not, and do not, sum to the batch's.
COUPLED = {
    "*BatchNorm*(track_running_stats=False)": "normalises over the batch; refused",
    "*BatchNorm* in training mode": "normalises over the batch; refused",
    "Embedding*(scale_grad_by_freq=True)": "divides by the token's count in the batch: a sample alone counts otherwise",
    "Embedding*max_norm=*": "the forward pass changes the weights; refused",
    "mode: Dropout in training": "each call draws another mask",
    "batch: divided by its size": "a batch of one is divided by one",
}
# Parameters without a gradient, on purpose; anywhere else a zero gradient would test nothing.
UNUSED = ("unused: *", "MultiheadAttention weights", "functional: functional_call with a parameter")


def marked(case: Case) -> Any:
    """Return the case as a test parameter; one with no truth is expected to fail."""
    reasons = [reason for pattern, reason in COUPLED.items() if fnmatchcase(case.name, pattern)]
    marks = [pytest.mark.xfail(strict=True, raises=(Unsupported, AssertionError), reason=reason) for reason in reasons]
    return pytest.param(case, id=case.name, marks=marks)


def dense(t: Tensor) -> Tensor:
    return t.to_dense() if t.is_sparse else t


@pytest.mark.parametrize("case", [marked(c) for c in CASES])
def test_the_loop_s_gradients_sum_to_the_batch_s(case: Case) -> None:
    setup = case.build()
    parameters = trainable(setup.model)
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global state
        rows = get_backend("naive").grads(setup.model, setup.loss_fn)(setup.inputs, setup.targets)
        losses = setup.loss_fn(call(setup.model, setup.inputs), setup.targets)
        batch = batch_gradient(setup.model, setup.loss_fn, setup.inputs, setup.targets)
    assert losses.shape == setup.targets.shape[:1]
    assert rows.keys() == parameters.keys()
    for (name, row), whole in zip(rows.items(), batch.values(), strict=True):
        # float64 rounding of sums of fewer than 1e4 terms of a size near 1
        torch.testing.assert_close(
            dense(row).sum(0), dense(whole), rtol=1e-9, atol=1e-11, msg=partial("{}: {}".format, name)
        )
        assert dense(row).any() or any(fnmatchcase(case.name, pattern) for pattern in UNUSED), f"{name}: no gradient"


def test_names_are_unique() -> None:
    names = [c.name for c in CASES]
    assert len(names) == len(set(names))


def test_building_leaves_the_random_state_and_repeats_itself() -> None:
    state = torch.random.get_rng_state()
    for case in CASES:
        one, two = case.build(), case.build()
        for a, b in zip(everything(one), everything(two), strict=True):
            assert a.dtype in (torch.float64, torch.int64, torch.bool), f"{case.name}: {a.dtype}"
            assert a.data_ptr() != b.data_ptr() or a.numel() == 0, f"{case.name}: two builds share a tensor"
            assert torch.equal(a, b), f"{case.name}: two builds differ"
    assert torch.equal(state, torch.random.get_rng_state())


def everything(setup: Any) -> list[Tensor]:
    return [*setup.model.parameters(), *setup.model.buffers(), *tensors(setup.inputs), setup.targets]


def test_whole_model_cases_have_a_reason() -> None:
    assert [c.name for c in model_cases() if not c.reason] == []


def test_parametrised_layers_are_found() -> None:
    found = parametrised_layers()
    assert {nn.Linear, nn.LSTM, nn.InstanceNorm2d, nn.TransformerEncoder, nn.PReLU} <= found
    assert not {nn.ReLU, nn.Dropout, nn.MaxPool2d, nn.CrossEntropyLoss} & found


def test_every_layer_and_option_of_torch_is_covered() -> None:
    assert uncovered() == []


class Gained(nn.Linear):
    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, groups: int = 1) -> None:
        super().__init__(in_features, out_features, bias)


class Widened(nn.Conv2d):
    def __init__(self, *args: Any, padding_mode: Literal["zeros", "mirror"] = "zeros", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class New(nn.Module):
    def __init__(self, size: int, twist: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))


class Strange(New):
    def __init__(self, plan: str) -> None:
        super().__init__(len(plan))


@pytest.mark.parametrize(
    ("name", "layer", "missing"),
    [
        ("Linear", Gained, ["Linear.groups"]),
        ("Conv2d", Widened, ["Conv2d.padding_mode='mirror'"]),
        ("New", New, ["New"]),
        ("Strange", Strange, ["Strange"]),
    ],
)
def test_what_torch_adds_is_uncovered(
    monkeypatch: pytest.MonkeyPatch, name: str, layer: type[nn.Module], missing: list[str]
) -> None:
    monkeypatch.setattr(nn, name, type(name, (layer,), {}), raising=False)
    assert uncovered() == missing
