"""What calls of a CUDA graph return: copies, or the graph's own memory in a dict of the caller's own."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from backends import graphs


@pytest.mark.parametrize("kept", [True, False])
def test_results_are_the_callers(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"weight": torch.zeros(3), "bias": torch.zeros(2)}
    recorded = SimpleNamespace(replay=lambda inputs, targets: own)
    monkeypatch.setattr(graphs, "_record", lambda *call: recorded)

    def fn(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        raise AssertionError("it is replayed")

    call = graphs.graphed(fn, kept=kept)
    first = call(torch.zeros(1, 2), torch.zeros(1))
    first.pop("bias")
    second = call(torch.zeros(1, 2), torch.zeros(1))
    assert set(second) == {"weight", "bias"}
    assert (second["weight"].data_ptr() == own["weight"].data_ptr()) == (not kept)
