"""Timing's arithmetic on made-up samples; nothing here asserts how long something takes."""

import random

import pytest
import torch
from torch import nn

from testbed import memory, timing, worker
from testbed.agreement import Calibrated
from testbed.problems import Problem
from testbed.records import Record, exit_code
from testbed.report import units


def noisy(center: float, seed: int, n: int = 30) -> list[float]:
    draw = random.Random(seed)
    return [center * draw.lognormvariate(0, 0.05) for _ in range(n)]


def test_ratio_interval_holds_the_ratio() -> None:
    found = timing.ratio(noisy(0.5, 1), noisy(1.0, 2))
    assert found.low <= found.value <= found.high
    assert 0.45 < found.low < 0.5 < found.high < 0.55


@pytest.mark.parametrize(("center", "verdict"), [(0.5, "faster"), (2.0, "slower"), (1.0, "can't tell")])
def test_verdict(center: float, verdict: str) -> None:
    floor = timing.floor_of(timing.ratio(noisy(1.0, 3), noisy(1.0, 2)))
    assert timing.verdict(timing.ratio(noisy(center, 1), noisy(1.0, 2)), floor) == verdict


def test_a_difference_within_the_floor_is_not_called() -> None:
    found = timing.ratio(noisy(0.9, 1), noisy(1.0, 2))
    assert timing.verdict(found, floor=0.0) == "faster"
    assert timing.verdict(found, floor=0.2) == "can't tell"


def test_the_same_backend_under_two_names_is_seldom_called_faster() -> None:
    called = 0
    for seed in range(0, 300, 3):
        base = noisy(1.0, seed)
        floor = timing.floor_of(timing.ratio(noisy(1.0, seed + 1), base))
        called += timing.verdict(timing.ratio(noisy(1.0, seed + 2), base), floor) != "can't tell"
    assert called <= 5


def test_rounds_are_shuffled_complete_and_repeatable() -> None:
    first, again = (list(timing.rounds("abcd", 20, 1e9, seed)) for seed in (0, 0))
    assert first == again
    assert all(sorted(order) == list("abcd") for order in first)
    assert len({tuple(order) for order in first}) > 10


def test_rounds_end_when_time_is_up_but_two_are_run() -> None:
    assert len(list(timing.rounds("ab", 20, max_s=0.0, seed=0))) == 2


def calls(seconds: list[float]) -> list[timing.Sample]:
    return [timing.Sample(s, s) for s in seconds]


@pytest.mark.parametrize(
    ("rounds", "precision", "enough"),
    [(30, 0.1, True), (30, 0.001, False), (30, 0.0, False), (timing.ENOUGH - 1, 0.9, False)],
    ids=["narrow", "wide", "never", "too few rounds to know"],
)
def test_rounds_are_enough_when_every_ratio_is_known_well(rounds: int, precision: float, enough: bool) -> None:
    samples = {"base": calls(noisy(1.0, 1, rounds)), "other": calls(noisy(0.5, 2, rounds))}
    assert timing.precise(samples, "base", precision) is enough


def test_one_ratio_that_is_wide_asks_for_more_rounds() -> None:
    wide = [random.Random(i).lognormvariate(0, 1) for i in range(30)]
    samples = {"base": calls(noisy(1.0, 1)), "other": calls(noisy(1.0, 2)), "wide": calls(wide)}
    assert not timing.precise(samples, "base", 0.1)


def test_summary_keeps_outliers() -> None:
    samples = [timing.Sample(s, s) for s in [*noisy(1.0, 0), 50.0]]
    found = timing.summary(samples)
    assert max(found["samples_s"]) == 50.0
    assert found["outliers"] == 1
    assert found["p5_s"] <= found["median_s"] <= found["p95_s"]


def test_limit_is_the_worse_of_arithmetic_and_memory() -> None:
    assert timing.limit(flops=100, written=10, peak=10.0, bandwidth=10.0).seconds == 10.0
    assert timing.limit(flops=10, written=100, peak=10.0, bandwidth=10.0).seconds == 10.0


def test_ceilings_are_measured() -> None:
    peak, bandwidth = timing.ceilings(torch.device("cpu"), torch.float32, size=64)
    assert peak > 0
    assert bandwidth > 0


def test_peak_memory_sees_what_a_call_takes() -> None:
    found = memory.peak(lambda: torch.ones(2**24), torch.device("cpu"))  # 64 MiB, touched
    if found["peak_bytes"] is None:
        pytest.skip("this system cannot reset the high-water mark")
    assert 0.95 * 2**26 <= found["peak_bytes"] < 2**28  # a few pages may have been resident before


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["ok", "unsupported", "unavailable"], 0),
        (["ok", "disagrees"], 1),
        (["nonfinite", "error"], 1),
        (["ok", "error"], 3),
        (["oom"], 3),
        (["timeout", "crash"], 3),
        (["interrupted", "ok"], 130),
    ],
)
def test_exit_code(statuses: list[str], code: int) -> None:
    assert exit_code([record(status) for status in statuses]) == code


def test_what_is_expected_is_no_failure() -> None:
    assert exit_code([record("disagrees")], {"b": "disagrees"}) == 0
    assert exit_code([record("ok")], {"b": "disagrees"}) == 1


def record(status: str) -> Record:
    return Record("0", "e", {}, "b", {}, "grads", status, "", {}, "", {}, {}, {}, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.seconds(0.3434), "343 ms"),
        (units.seconds(1.2e-5), "12 µs"),
        (units.seconds(None), "–"),
        (units.size(302.4e6), "302 MB"),
        (units.ratio(0.5432), "0.54"),
        (units.ratio(0.00625), "0.0063"),
        (units.ratio(0.0), "0.00"),
        (units.ratio(123.4), "123"),
        (units.interval([0.5, 0.625]), " [0.50–0.62]"),
        (units.spread(1.0, 0.9, 1.3), "±20 %"),
    ],
)
def test_numbers_read_well(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.usefixtures("own_random_state")
def test_other_threads_fall_asleep_before_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[object] = []
    x, y = torch.ones(2, 3), torch.zeros(2, dtype=torch.long)
    problem = Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(reduction="none"), x, y, x, y)
    timed = worker.Worker(problem, "norms", {}, Calibrated())
    timed.functions["a call"] = lambda inputs, targets: happened.append("call") or torch.ones(2)
    monkeypatch.setattr(worker.time, "sleep", happened.append)
    timed.time("a call")
    assert happened == [worker.QUIET, "call", "call"]  # a short call has an untimed one before it
