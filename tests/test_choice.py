"""What is chosen by measuring: by what time, and never a kernel that is wrong or does not run."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import graphs
from backends.ops import choice
from backends.ops.choice import CHOSEN, fastest
from backends.ops.live import peak


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("Failed to find C compiler.\nPlease specify via CC."),
            "does not run: Failed to find C compiler.",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), "needs more memory than there is to be compared"),
    ],
)
def test_a_kernel_that_does_not_run_is_not_the_fastest_and_that_is_said(
    error: RuntimeError, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> torch.Tensor:
        raise error

    monkeypatch.setattr("backends.ops.choice.with_kernels", lambda like: True)
    like, what = torch.zeros(1), f"a kernel with {type(error).__name__}"
    for _ in range(2):
        assert fastest({"direct": lambda: like}, what, 1, like, {"kernel": broken}) is like
    (found,) = (CHOSEN.pop(key) for key in list(CHOSEN) if key.startswith(what))
    assert found == f"direct (kernel {said})"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t * (1 + 1e-6), ""),  # a few roundings
        (lambda t: t * 1.01, " (kernel is off by 5.0e-02 where the norm is 5.0e+00)"),
        (lambda t: t.roll(1), " (kernel is off by inf where the norm is 5.0e+00)"),
        (lambda t: t * torch.nan, " (kernel is off by nan where the norm is 5.0e+00)"),
    ],
    ids=["rounded", "scaled", "permuted", "nan"],
)
def test_a_kernel_that_is_wrong_is_not_the_fastest_and_that_is_said(
    change: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.ops.choice.with_kernels", lambda like: True)
    right = torch.tensor([4.0, torch.inf, -3.0], dtype=torch.float32)  # infinity is no number to compare with

    def slow() -> torch.Tensor:
        time.sleep(0.01)
        return right

    what = f"a kernel{said}"
    found = fastest({"slow": slow}, what, 1, right, {"kernel": lambda: change(right)})
    (chosen,) = (CHOSEN.pop(key) for key in list(CHOSEN) if key.startswith(f"{what}, "))
    assert chosen == (f"slow{said}" if said else "kernel")
    assert torch.equal(found, right) == bool(said)


def test_a_wrong_kernel_is_noticed_where_it_writes_to_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backends.ops.choice.with_kernels", lambda like: True)
    out = torch.zeros(3, dtype=torch.float32)
    fastest({"direct": lambda: out.fill_(2)}, "one memory", 1, out, {"kernel": lambda: out.fill_(3)})
    (chosen,) = (CHOSEN.pop(key) for key in list(CHOSEN) if key.startswith("one memory"))
    assert chosen == "direct (kernel is off by 1.7e+00 where the norm is 3.5e+00)"
    assert out.tolist() == [2, 2, 2]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_kernel_has_to_be_right_on_paths_that_it_does_not_take_yet(
    wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.ops.choice.with_kernels", lambda like: True)
    right, taken = torch.ones(3), []

    def path(number: int) -> torch.Tensor:
        taken.append(number)
        return right * 2 if number == wrong else right

    def slow() -> torch.Tensor:
        time.sleep(0.01)
        return right

    what = f"path {wrong} is wrong"
    kernel = tuple(partial(path, number) for number in (0, 1))
    assert fastest({"slow": slow}, what, 1, right, {"kernel": kernel}).tolist() == [1, 1, 1]
    (chosen,) = (CHOSEN.pop(key) for key in list(CHOSEN) if key.startswith(what))
    assert chosen.startswith("slow (kernel is off by" if wrong in (0, 1) else "kernel")
    assert taken.count(1) == 1  # only the first is timed, and taken


@pytest.mark.parametrize("sample", [0, 1, 4, 7])
def test_a_kernels_result_is_compared_at_both_ends_where_it_is_large(
    sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be no room for it a second time."""
    monkeypatch.setattr("backends.ops.choice.with_kernels", lambda like: True)
    monkeypatch.setattr("backends.ops.choice.COMPARED", 2 * 4000)

    def made(wrong: float) -> torch.Tensor:
        result = torch.ones(8, 1000)
        result[sample] = wrong
        return result

    ways, what = {"direct": lambda: made(1)}, f"sample {sample}"
    taken = peak(lambda: fastest(ways, what, 8, torch.ones(1), {"kernel": lambda: made(2)}))
    (chosen,) = (CHOSEN.pop(key) for key in list(CHOSEN) if key.startswith(what))
    assert ("kernel is off" in chosen) == (sample in (0, 1, 7))
    assert taken < 8 * 4000 * 3


def test_another_way_that_fails_is_not_hidden() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        fastest({"direct": lambda: torch.zeros(1), "other": broken}, "a broken way", 1, torch.zeros(1))


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


def test_a_way_that_is_clearly_slower_is_not_tried_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    takes, tried = {"near": 1.2, "fast": 1.0, "slow": 1.3}, Counter[str]()

    def timed(way: Callable[[], str], like: Tensor) -> float:
        tried[way()] += 1
        return 9.0 if tried[way()] == 1 else takes[way()]  # the first time it compiles

    monkeypatch.setattr(choice, "timed", timed)
    ways = {name: lambda name=name: name for name in takes}
    assert choice.fastest_name(ways, "slow ways", 1, torch.zeros(1)) == "fast"
    assert tried == {"near": 5, "fast": 5, "slow": 2}
    CHOSEN.pop(next(key for key in CHOSEN if key.startswith("slow ways")))


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


def test_what_is_recorded_is_timed_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_on_device", lambda way, like: 7.0)
    monkeypatch.setattr(choice, "_wait", lambda like: None)
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    assert choice.timed(lambda: None, on_gpu) != 7
    with graphs._is_ahead():
        assert choice.timed(lambda: None, on_gpu) == 7
        assert choice.timed(lambda: None, torch.zeros(1)) != 7
