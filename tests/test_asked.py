"""What was asked and then changed, in whatever way, is not taken for what it was: masks by whose codes a model goes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import get_backend
from tests.asserts import assert_close
from tests.cases import DEVICE, real, squares
from tests.test_answers import model_of

pytestmark = pytest.mark.usefixtures("own_random_state")


def marked(mask: Tensor) -> Tensor:
    return (mask == 7).sum() > 0


def sum_goes_on(mask: Tensor) -> Any:
    count = (mask == 5).sum()
    count += (mask == 7).sum()
    return count == 0


def flag_goes_on(mask: Tensor) -> Any:
    some = (mask == 5).any()
    some |= marked(mask)
    return not some


def flags_go_on(mask: Tensor) -> Any:
    mine = mask == 1
    mine &= ~marked(mask)
    return not mine.any()


def sum_is_another(mask: Tensor) -> Any:
    count = (mask == 5).sum()
    count.data.add_((mask == 7).sum())
    return count == 0


def flag_is_another(mask: Tensor) -> Any:
    some = (mask == 5).any()
    some.data.copy_(marked(mask))
    return not some


def flags_are_others(mask: Tensor) -> Any:
    mine = mask == 1
    mine.data.mul_(~marked(mask))
    return not mine.any()


def of_the_largest(mask: Tensor) -> Any:
    return (mask == mask.amax() - 5).any()


def codes(*changes: tuple[int | slice, int, int], rest: int = 1) -> Tensor:
    """Return a mask of eight samples with (sample or slice, position, code) changed."""
    mask = torch.full((8, 5), rest, device=DEVICE)
    for i, position, code in changes:
        mask[i, position] = code
    return mask


ALL_OF_THEM = slice(None)

CODES = [
    codes(),
    codes(rest=3),
    codes((slice(3), 1, 7)),
    codes((5, 1, 7)),
    codes((ALL_OF_THEM, 1, 7), (ALL_OF_THEM, 2, 2)),
    codes((5, 1, 7), (ALL_OF_THEM, 2, 2)),
]
"""Nothing that is made up for the first of these has what is marked in others."""


def assert_codes_are_right(forward: Callable[..., Tensor]) -> None:
    model = model_of(forward).to(DEVICE, torch.float64)
    ours, loop = (get_backend(name).grads(model, squares) for name in ("bookkeeping", "naive"))
    x, targets = real(8, 5, 4).to(DEVICE), real(8).to(DEVICE)
    for mask in CODES:
        assert_close(ours((x, mask), targets), loop((x, mask), targets))


@pytest.mark.parametrize(
    "ask",
    [sum_goes_on, flag_goes_on, flags_go_on, sum_is_another, flag_is_another, flags_are_others, of_the_largest],
)
def test_what_was_asked_is_not_taken_for_something_else(ask: Callable[[Tensor], Any]) -> None:
    assert_codes_are_right(lambda s, x, mask: s.b((2 if ask(mask) else 1) * s.a(x).tanh().mean(1)))


def test_what_holds_for_any_is_not_used_as_a_number() -> None:
    assert_codes_are_right(lambda s, x, mask: s.b((1 + (mask == 7).any()) * s.a(x).tanh().mean(1)))
