"""Both passes as one graph, compiled."""

import pytest
import torch
from torch import Tensor, nn

from backends import get_backend
from backends.base import Unsupported
from backends.batch import form
from backends.ops import pages
from tests.asserts import assert_close
from tests.cases import DEVICE, N, real, squares
from tests.habits import by_its_values, habit

pytestmark = pytest.mark.usefixtures("own_random_state")


def net(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a small model of ops of many kinds, inputs and targets; `kind` is what it begins with."""
    torch.manual_seed(0)
    if kind == "tokens":
        first, inputs = nn.Embedding(7, 6, padding_idx=0), torch.arange(N * 4, device=DEVICE).view(N, 4) % 7
        model = nn.Sequential(first, nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
    else:
        first, inputs = nn.Conv2d(2, 4, 3, padding=1), real(N, 2, 5, 5)
        model = nn.Sequential(first, nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(27, 3))
    return model.to(DEVICE, torch.float64), inputs, real(N, 3)


def squares_of_rows(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1)


@pytest.mark.parametrize(
    ("kind", "quantities"), [("tokens", ["norms", "variance"]), ("images", ["grads", "clipped_sum"])]
)
def test_compiled_is_the_same_and_sees_later_steps(kind: str, quantities: list[str]) -> None:
    model, inputs, targets = net(kind)
    ours = {q: getattr(get_backend("bookkeeping", compile=True), q)(model, squares_of_rows) for q in quantities}
    plain = {q: getattr(get_backend("naive"), q)(model, squares_of_rows) for q in quantities}
    found, expected = [], []
    for _ in range(2):
        found.append({quantity: fn(inputs, targets) for quantity, fn in ours.items()})
        expected.append({quantity: fn(inputs, targets) for quantity, fn in plain.items()})
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
    for quantity in quantities:
        for ours_then, loop_then in zip(found, expected, strict=True):  # the first results are still what they were
            assert_close(ours_then[quantity], loop_then[quantity])


def test_one_sample_is_compiled_too() -> None:
    """As Poisson sampling gives one at times."""
    model, inputs, targets = net("tokens")
    ours, loop = (
        get_backend(b, **o).norms(model, squares_of_rows)
        for b, o in (("bookkeeping", {"compile": True}), ("naive", {}))
    )
    assert_close(ours(inputs[:1], targets[:1]), loop(inputs[:1], targets[:1]))


def test_each_autocast_has_a_graph_of_its_own() -> None:
    forms = set()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE.type, dtype):
            forms.add(form(real(4, 2), real(4)))
    assert len(forms | {form(real(4, 2), real(4)), form(real(4, 2), real(4).float())}) == 4


def test_what_is_run_one_by_one_or_asks_for_values_is_not_compiled() -> None:
    for forward in (by_its_values, lambda s, x: s.a(x) if s.a.bias.sum() > -9 else s.b(x)):
        with pytest.raises(Unsupported, match="compile=True"):
            get_backend("bookkeeping", compile=True).norms(habit(forward), squares)(real(6, 5), real(6))


def test_large_results_of_a_compiled_call_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LARGEST", 0)
    model, inputs, targets = nn.Linear(300, 300).to(DEVICE, torch.float64), real(N, 300), real(N, 300)
    ours = get_backend("bookkeeping", compile=True).grads(model, squares_of_rows)
    loop = get_backend("naive").grads(model, squares_of_rows)
    first, expected = ours(inputs, targets), loop(inputs, targets)
    ours(inputs + 1, targets)
    assert_close(first, expected)
