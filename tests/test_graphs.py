"""What calls of a CUDA graph return: copies, or the graph's own memory in a dict of the caller's own."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from backends import graphs
from backends.base import Unsupported
from backends.running import kept_random_state
from backends.shortage import lack_of_memory


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


@pytest.mark.parametrize("error", [RuntimeError("a value was asked for"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_recording_that_fails_says_why_and_leaves_the_stream_as_it_was(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA does it: to end a recording that has failed raises, and then torch does not leave its stream."""
    streams: list[object] = ["the caller's"]

    @contextmanager
    def stream(other: object) -> Iterator[None]:
        before = streams[-1]
        streams.append(other)
        try:
            yield
        finally:
            streams.append(before)

    @contextmanager
    def recording(graph: object) -> Iterator[None]:
        streams.append("the recording's")
        try:
            yield
        except BaseException:
            raise RuntimeError("operation failed due to a previous error during capture") from None

    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)

    def fn(inputs: Tensor, targets: Tensor) -> None:
        if graphs.recording():
            raise error

    with pytest.raises(Unsupported, match=str(error)) as refused:
        graphs.graphed(fn)(torch.zeros(1, 2), torch.zeros(1))
    assert streams[-1] == "the caller's"
    assert (lack_of_memory(refused.value) is not None) == isinstance(error, torch.OutOfMemoryError)


def test_inputs_and_targets_with_a_gradient_leave_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, targets = torch.zeros(1, 2), torch.zeros(1)
    graph = graphs._Graph(SimpleNamespace(replay=lambda: None), inputs, targets, {})  # type: ignore[arg-type]
    monkeypatch.setattr(graphs, "_record", lambda *call: graph)
    graphs.graphed(lambda *call: None)(torch.ones(1, 2, requires_grad=True), torch.ones(1, requires_grad=True))
    assert (inputs.tolist(), targets.tolist()) == ([[1, 1]], [1])
    assert not inputs.requires_grad
    assert not targets.requires_grad


def test_a_gpus_random_state_is_not_read_while_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    forked = []
    monkeypatch.setattr("backends.running._gpus", lambda model: [0])
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext(forked.append(devices)))
    for context in (nullcontext(), graphs._recorded()):
        with context, kept_random_state(torch.nn.Identity()):
            pass
    assert forked == [[0], []]


def test_what_the_host_draws_while_recording_is_given_back() -> None:
    """A library may draw a seed in each call, as those do that make a DataLoader."""
    before = torch.get_rng_state()
    with graphs._recorded(), kept_random_state(torch.nn.Identity()):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), before)
