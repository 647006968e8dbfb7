"""How much memory passes hold, and that norms and clipped sums take little more than an ordinary step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends import get_backend
from backends.base import own_copy
from backends.ops.footprint import Footprint, pairs, saved
from backends.ops.linear import Scattered
from backends.ops.live import peak
from backends.ops.outer import Outer
from backends.ops.parts import InParts
from backends.ops.passes import Passes
from backends.ops.persample import Dense
from backends.ops.several import Sum
from backends.ops.ways import Ways
from tests.asserts import assert_close
from tests.cases import DEVICE, Functional, linear, real, squares

pytestmark = pytest.mark.usefixtures("own_random_state")


def test_what_a_forward_pass_saves_is_counted_once_and_without_what_was_there() -> None:
    model, x = nn.Sequential(linear(5, 7), nn.Tanh(), linear(7, 3)).to(DEVICE), torch.ones(2, 5, device=DEVICE)
    found = saved(lambda: model(x).sum().backward(), [*model.parameters(), x])
    assert found == 2 * 7 * 4  # the output of tanh, which its own gradient and that of the next weight need
    assert saved(lambda: model(x).sum().backward(), model.parameters()) == found + x.nbytes


def test_pairs_take_what_the_smaller_form_takes() -> None:
    forms = [Dense(real(4, 3)), Outer(real(4, 2, 5), real(4, 2, 6)), Outer(real(4, 9, 2), real(4, 9, 3))]
    assert pairs(forms) == 8 * (3 + 2 * (5 + 6) + 2 * 3)
    table = Scattered(torch.zeros(4, 2, dtype=torch.long, device=DEVICE), real(4, 2, 3), 1000)
    assert pairs([table]) == 8 * (2 + 2 * 3)


@pytest.mark.parametrize(("step", "pairs", "spare"), [(100, 40, 10), (100, 120, 5), (100, 130, 0), (0, 0, 0)])
def test_spare_is_what_a_step_leaves_and_a_quarter_of_the_pairs_at_most(
    step: int, pairs: int, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.ops.footprint.FREE", 0)
    assert Footprint(step, pairs).spare(3, 3) == 3 * spare


def test_a_part_of_a_batch_may_hold_what_the_other_samples_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backends.ops.footprint.FREE", 0)
    assert Footprint(100, 40).spare(3, 12) == 3 * 10 + 9 * 125
    assert Footprint(100, 300).spare(3, 12) == 9 * 125 - 3 * 175
    assert Footprint(100, 40, 300).spare(3, 12) == 3 * 10 + 9 * 125 - 2 * 300
    assert Footprint(100, 40, 300).spare(3, 4) == 3 * 10, "two sums take more than the other samples"
    assert Footprint(100, 900).spare(3, 4) == 0


def test_what_a_process_keeps_anyway_may_be_held() -> None:
    assert Footprint(2**20, 2**10).spare(4, 4) == 2**26 - 4 * 2**20
    assert Footprint(2**20, 2**21).spare(4, 4) == 2**26 - 4 * 2**21
    assert Footprint(2**20, 2**21).spare(2**7, 2**7) == 0
    assert Footprint(0, 0).spare(4, 4) == 0, "nothing is known"


def test_passes_know_the_footprint_of_each_form() -> None:
    model = nn.Sequential(linear(5, 5), nn.Tanh(), linear(5, 5)).to(DEVICE, torch.float64)
    passes = Ways(Passes(own_copy(model), squares))
    for length in (2, 3):
        passes(real(6, length, 5), real(6), lambda name, g: 0)
        assert passes.footprint.step == 8 * (5 * length + 5 * length), "what tanh returns, and what is squared"
        assert passes.footprint.pairs == 8 * (2 * min(10 * length, 25) + 2 * 5)


def made_anew(form: Any, monkeypatch: pytest.MonkeyPatch, spare: int | None = None) -> list[int]:
    """Return a list that fills with how many gradients are weighted in a form, perhaps with so much to spare."""
    seen: list[int] = []
    weighted = form.weighted
    monkeypatch.setattr(form, "weighted", lambda self, *args: seen.append(self.samples) or weighted(self, *args))
    if spare is not None:
        monkeypatch.setattr(Footprint, "spare", lambda self, samples, whole: spare)
    monkeypatch.setattr("backends.ops.persample.LITTLE", 0)
    return seen


@pytest.mark.parametrize(("spare", "contractions"), [(0, 2), (2559, 2), (2560, 1), (5119, 1), (5120, 0), (2**20, 0)])
def test_gradients_are_kept_where_there_is_memory_to_spare(
    spare: int, contractions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = made_anew(Outer, monkeypatch, spare)
    model = nn.Sequential(linear(16, 16), nn.Tanh(), linear(16, 16)).to(DEVICE, torch.float64)
    inputs, targets = real(5, 6, 16), real(5)  # 192 numbers of a pair, 256 of a gradient: 2560 bytes more
    fn = get_backend("bookkeeping").clipped_sum(model, squares, max_norm=0.1)
    fn(inputs, targets)
    seen.clear()
    found = fn(inputs, targets)
    assert len(seen) == contractions
    for name, t in get_backend("naive").clipped_sum(model, squares, max_norm=0.1)(inputs, targets).items():
        assert_close(found[name], t)


@pytest.mark.parametrize(("spare", "weighted_later"), [(0, 1), (2**20, 0)])
def test_gradients_of_a_weight_with_two_uses_are_kept_too(
    spare: int, weighted_later: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = made_anew(Sum, monkeypatch, spare)
    model = Functional(lambda s, x: F.linear(s.e(x), s.e.weight).sin(), e=nn.Embedding(16, 16)).to(
        DEVICE, torch.float64
    )
    inputs, targets = torch.arange(20, device=DEVICE).view(4, 5) % 16, real(4)
    found = get_backend("bookkeeping").clipped_sum(model, squares, max_norm=0.1)(inputs, targets)
    assert len(seen[-1:]) == weighted_later
    assert_close(found, get_backend("naive").clipped_sum(model, squares, max_norm=0.1)(inputs, targets))


def perceptron() -> tuple[nn.Module, Tensor]:
    layers = [layer for _ in range(6) for layer in (linear(32, 32), nn.Tanh())]
    return nn.Sequential(*layers), real(32, 8, 32)


def convolutions() -> tuple[nn.Module, Tensor]:
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers), real(32, 8, 10, 10)


def transformer() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), real(32, 12, 16)


def without_what_is_free(monkeypatch: pytest.MonkeyPatch, *, more_parts_are_faster: bool) -> None:
    """Let a step's memory be all that there is, and keeping gradients be faster than to make them anew."""
    for free in ("footprint.FREE", "parts.FREE", "persample.LITTLE"):
        monkeypatch.setattr(f"backends.ops.{free}", 0)
    seconds = 0.5 if more_parts_are_faster else 2.0
    monkeypatch.setattr(InParts, "_seconds", lambda self, counts, *batch: {counts[0]: 1.0, counts[1]: seconds})
    monkeypatch.setattr("backends.bookkeeping.fastest_name", lambda *measured: "kept")


@pytest.mark.parametrize("quantity", ["norms", "clipped_sum"])
@pytest.mark.parametrize("problem", [perceptron, convolutions, transformer])
@pytest.mark.parametrize("more_parts_are_faster", [False, True])
def test_memory_stays_near_that_of_an_ordinary_step(
    quantity: str,
    problem: Callable[[], tuple[nn.Module, Tensor]],
    more_parts_are_faster: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_what_is_free(monkeypatch, more_parts_are_faster=more_parts_are_faster)
    model, inputs = problem()
    model, targets = model.to(DEVICE, torch.float64), real(len(inputs))
    fn = getattr(get_backend("bookkeeping"), quantity)(model, squares)
    fn(inputs, targets)
    step = peak(partial(Passes(own_copy(model), squares).plain, inputs, targets))
    assert peak(partial(fn, inputs, targets)) <= 1.3 * step


@pytest.mark.parametrize("more_parts_are_faster", [False, True])
def test_parts_of_a_batch_have_room_for_gradients(more_parts_are_faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    without_what_is_free(monkeypatch, more_parts_are_faster=more_parts_are_faster)
    seen = made_anew(Outer, monkeypatch)
    layers = [layer for _ in range(6) for layer in (linear(72, 72), nn.Tanh())]
    model, inputs, targets = nn.Sequential(*layers).to(DEVICE, torch.float64), real(64, 13, 72), real(64)
    fn = get_backend("bookkeeping").clipped_sum(model, squares, max_norm=0.1)
    fn(inputs, targets)
    seen.clear()
    found = fn(inputs, targets)
    assert bool(seen) != more_parts_are_faster, "gradients are weighted from pairs"
    assert_close(found, get_backend("naive").clipped_sum(model, squares, max_norm=0.1)(inputs, targets))
