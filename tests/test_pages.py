"""Memory for large results."""

import os
import weakref

import pytest
import torch

from backends import backend_class, get_backend
from backends.heap import LARGEST
from backends.ops.pages import Pool
from tests.asserts import assert_close
from tests.cases import linear, real, squares

pytestmark = pytest.mark.usefixtures("own_random_state")


def test_memory_is_given_out_again_once_nobody_holds_it() -> None:
    pool, like = Pool(), torch.zeros(0, dtype=torch.bfloat16)
    first = pool.empty((3, LARGEST), like)
    place, part = first.data_ptr(), first[1]
    assert (first.shape, first.dtype) == ((3, LARGEST), torch.bfloat16)
    del first
    assert pool.empty((3, LARGEST), like).data_ptr() != place, "a part of it is held"
    del part
    assert pool.empty((3, LARGEST), like).data_ptr() == place


def test_memory_that_is_kept_for_results_is_given_back_when_asked() -> None:
    pool, like = Pool(), torch.zeros(0)
    blocks = [weakref.ref(pool.empty((LARGEST,), like)), weakref.ref(pool.same("w", (LARGEST,), like))]
    assert blocks[1]() is not None
    backend_class("bookkeeping").release()
    assert [block() for block in blocks] == [None, None]
    assert not pool._blocks


@pytest.mark.parametrize("quantity", ["grads", "clipped_sum"])
def test_large_results_are_in_memory_of_the_pool(quantity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bookkeeping", "ops.pages", "ops.persample"):
        monkeypatch.setattr(f"backends.{module}.LARGEST", 0)
    monkeypatch.setattr("backends.ops.persample.LITTLE", 0)
    monkeypatch.setattr("backends.bookkeeping.fastest_name", lambda *measured: "made anew")
    taken: list[int] = []
    block = Pool._block
    monkeypatch.setattr(Pool, "_block", lambda self, size: taken.append(size) or block(self, size))
    model = linear(5, 4).to("cpu", torch.float64)
    fn = getattr(get_backend("bookkeeping"), quantity)(model, squares)
    inputs, targets = real(2, 5).cpu(), real(2).cpu()
    found = fn(inputs, targets)
    assert found["weight"].nbytes in taken
    assert_close(found["weight"], getattr(get_backend("naive"), quantity)(model, squares)(inputs, targets)["weight"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_memory_is_not_shared_with_forked_processes() -> None:
    held = Pool().empty((2 * LARGEST,), torch.zeros(0, dtype=torch.uint8))
    held[0] = 1
    if (child := os.fork()) == 0:
        held[0] = 2
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert held[0] == 1


def test_memory_outlives_its_pool() -> None:
    block = Pool().empty((LARGEST,), torch.zeros(0))
    assert block.fill_(1).sum() == LARGEST
