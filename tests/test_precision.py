"""TF32's two kinds of switches, and what runs without it, and without autocast."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import nn

from backends import get_backend, precision
from testbed.environment import environment
from tests.cases import DEVICE, Functional, linear, real, squares

pytestmark = pytest.mark.usefixtures("own_random_state")


@pytest.fixture(autouse=True)
def _switches_are_set_back() -> Iterator[None]:
    older = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    words, before = torch.get_float32_matmul_precision(), state()
    yield
    for switch in (torch.backends, torch.backends.cudnn):
        switch.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision(words)  # CPU products too
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = older
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    for switch, was in zip(precision.SWITCHES, before, strict=False):
        if switch.fp32_precision != was:
            switch.fp32_precision = was
    assert state() == before


def newer() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = "tf32"  # type: ignore[attr-defined]


def test_the_newer_switch_is_known_too() -> None:
    newer()
    with pytest.raises(RuntimeError):  # what a program that uses it must not be asked for
        _ = torch.backends.cudnn.allow_tf32
    assert (precision.tf32_in_products(), precision.tf32_in_convolutions()) == (True, False)
    found = environment(torch.device("cpu"))
    assert (found["tf32"], found["cudnn"]["allow_tf32"]) == (True, False)
    model = linear(5, 4).to(DEVICE, torch.float64)
    get_backend("bookkeeping").norms(model, squares)(real(3, 5), real(3))


@pytest.mark.parametrize("allowed", [True, False])
def test_the_older_switch_is_known(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    assert precision.tf32_in_products() == allowed


def older() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def by_words(words: str) -> None:
    torch.set_float32_matmul_precision(words)


def for_all() -> None:
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]


def for_all_after_words() -> None:
    """The older switches may then be read, and say less than the general one."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    for_all()


def for_cudnn_before_words() -> None:
    torch.backends.cudnn.fp32_precision = "tf32"  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("high")


GENERAL = newer, for_all, for_all_after_words, for_cudnn_before_words


def state() -> list[object]:
    """Return all switches; of those that may not be read, that."""
    found: list[object] = [switch.fp32_precision for switch in precision.SWITCHES]
    for read in (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            found.append(read())
        except RuntimeError:
            found.append("may not be read")
    return found


@pytest.mark.parametrize(
    "setting",
    [lambda: None, older, partial(by_words, "high"), partial(by_words, "medium"), *GENERAL],
)
def test_in_the_block_it_is_not_allowed_and_after_it_all_is_as_before(setting: Callable[[], None]) -> None:
    setting()
    before = state()
    with precision.without_tf32():
        assert not precision.tf32_in_products()
        assert not precision.tf32_in_convolutions()
        assert setting in GENERAL or "may not be read" not in state()[3:5]
    assert state() == before


def test_a_switch_that_follows_another_one_goes_on_to() -> None:
    for_all()
    with precision.without_tf32():
        pass
    torch.backends.fp32_precision = "ieee"  # type: ignore[attr-defined]
    assert not precision.tf32_in_products()
    assert not precision.tf32_in_convolutions()


def test_samples_are_looked_at_without_it() -> None:
    """Coarse arithmetic would hide what they show of each other."""
    older()
    seen: list[bool] = []

    def forward(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(precision.tf32_in_products())
        return s.a(x)

    model = Functional(forward, a=linear(5, 4)).to(DEVICE, torch.float64)
    get_backend("bookkeeping").grads(model, squares)(real(3, 5), real(3))
    _, _, *seen = seen  # to see what the model uses, and what it asks
    assert seen == sorted(seen)  # looks come first
    assert (seen[0], seen[-1]) == (False, True)


def test_only_float32_on_cuda_is_rounded_to_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    assert not precision.tf32_allowed(torch.zeros(1, device="cpu"))
    assert precision.tf32_allowed(torch.zeros(1, device=DEVICE, dtype=torch.float32)) == (DEVICE.type == "cuda")


@pytest.mark.parametrize("quantity", ["norms", "clipped_sum", "gram"])
def test_derived_quantities_are_not_rounded_once_more_under_autocast(quantity: str) -> None:
    """Under autocast gradients are rounded; what is made of them in float32 is not."""
    model = linear(8, 6).to(DEVICE, torch.float32)
    inputs, targets = (t.to(torch.float32) for t in (real(5, 8), real(5)))
    g = get_backend("naive", autocast="bfloat16").grads(model, squares)(inputs, targets)
    rows = torch.cat([t.flatten(1) for t in g.values()], 1)
    found = getattr(get_backend("naive", autocast="bfloat16"), quantity)(model, squares)(inputs, targets)
    norms = rows.norm(dim=1)
    factors = (1 / norms).clamp(max=1)
    if isinstance(found, torch.Tensor):
        expected = norms if quantity == "norms" else rows @ rows.mT
    else:
        found, expected = torch.cat([t.flatten() for t in found.values()]), factors @ rows
    assert (found - expected).norm() <= 1e-5 * expected.norm()
