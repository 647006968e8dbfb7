"""What calls of a CUDA graph return: copies, or the graph's own memory in a dict of the caller's own."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import graphs
from backends.base import Unsupported
from backends.ops import choice
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


def test_inputs_with_a_gradient_leave_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    static = torch.zeros(1, 2)
    graph = graphs._Graph(SimpleNamespace(replay=lambda: None), static, torch.zeros(1), {})  # type: ignore[arg-type]
    monkeypatch.setattr(graphs, "_record", lambda *call: graph)
    graphs.graphed(lambda *call: None)(torch.ones(1, 2, requires_grad=True), torch.zeros(1))
    assert static.tolist() == [[1, 1]]
    assert not static.requires_grad


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


def test_what_is_recorded_has_choices_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches count in a call, and cost next to nothing in a graph."""
    slow = []

    def measured(way: object, like: Tensor) -> float:
        slow.append(graphs.ahead())
        return float(way == ways["few launches"]) if graphs.ahead() else float(way == ways["many launches"])

    monkeypatch.setattr(choice, "timed", measured)
    ways = {"few launches": lambda: torch.zeros(1), "many launches": lambda: torch.ones(1)}
    recorded = SimpleNamespace(replay=lambda inputs, targets: choice.fastest(ways, "one thing", 1, targets))
    monkeypatch.setattr(graphs, "_record", lambda fn, *call: (fn(*call), recorded)[1])
    call = graphs.graphed(lambda inputs, targets: choice.fastest(ways, "one thing", 1, targets))
    assert call(torch.zeros(1), torch.zeros(1)).item() == 0  # a replay does not choose anew
    assert choice.fastest(ways, "one thing", 1, torch.zeros(1)).item() == 0
    found = {key: choice.CHOSEN.pop(key) for key in list(choice.CHOSEN) if key.startswith("one thing")}
    assert sorted(found.values()) == ["few launches", "many launches"]
    assert [value for key, value in found.items() if "in a CUDA graph" in key] == ["many launches"]
    assert set(slow) == {True, False}
    assert not graphs.ahead()


def test_ways_for_a_graph_are_timed_while_the_device_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are recorded on both sides of the second call, after the device was told to wait for the host."""
    said: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("event")

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", said.append)
    assert choice._on_device(lambda: said.append("call"), torch.zeros(1)) == 0.003
    held = said.pop(1)
    assert said == ["call", "event", "call", "event", "wait"]
    assert isinstance(held, int)
    assert 0 < held < choice.CYCLES * choice.HELD_BACK

    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert choice._on_device(too_large, torch.zeros(1)) == float("inf")
