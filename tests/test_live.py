"""How much memory a call's tensors take."""

import pytest
import torch
from torch import Tensor

from backends.ops.live import peak
from tests.cases import DEVICE

KB = 1000


def kilobyte() -> Tensor:
    return torch.zeros(KB, dtype=torch.uint8, device=DEVICE)


def test_what_lives_at_the_same_time_is_added_and_views_are_not() -> None:
    def call() -> None:
        a = kilobyte()
        b = a + 1
        del a
        c = b + 1
        view = c.view(10, 100).T
        del b, c
        other = view.contiguous()
        del view
        assert len(other + other) == 100

    assert peak(call) == 2 * KB


def test_what_was_there_before_does_not_count() -> None:
    before = kilobyte()
    assert peak(lambda: before.add_(1).view(10, 100)) == 0
    assert peak(lambda: before + 1) == KB


def test_what_a_backward_pass_needs_lives_until_then() -> None:
    x = torch.zeros(KB, device=DEVICE, requires_grad=True)

    def passes(times: int) -> Tensor:
        y = x
        for _ in range(times):
            y = y.exp()
        return torch.autograd.grad(y.sum(), x)[0]

    more = peak(lambda: passes(9)) - peak(lambda: passes(5))
    assert more == 4 * x.nbytes


@pytest.mark.parametrize("lack", [torch.OutOfMemoryError(), RuntimeError("can't allocate memory"), MemoryError()])
def test_what_does_not_fit_is_endless(lack: Exception) -> None:
    def call() -> None:
        raise lack

    assert peak(call) == float("inf")


def test_sparse_tensors_are_left_out() -> None:
    assert peak(lambda: torch.eye(3, device=DEVICE).to_sparse().coalesce()) > 0
