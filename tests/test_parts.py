"""A batch in parts."""

import gc
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn

from backends import get_backend
from backends.batch import Batch, signature
from backends.ops.choice import CHOSEN
from backends.ops.parts import InParts
from tests.asserts import assert_close
from tests.cases import DEVICE, linear, real, squares

pytestmark = pytest.mark.usefixtures("own_random_state")


@pytest.mark.parametrize("quantity", ["norms", "clipped_sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_batch_in_parts_has_the_same_result(
    quantity: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(linear(5, 5), nn.Tanh(), linear(5, 5)).to(DEVICE, dtype)
    inputs, targets = real(17, 5).to(dtype), real(17).to(dtype)
    found = []
    for parts in (1, 2):
        monkeypatch.setattr(InParts, "_seconds", lambda self, counts, *batch, parts=parts: {1: parts, 2: 1.5, 4: 2})
        found.append(getattr(get_backend("bookkeeping"), quantity)(model, squares)(inputs, targets))
        assert CHOSEN[f"{quantity} of Sequential of 17 samples"] == ("all at once" if parts == 1 else "in 2 parts")
    once, twice = ({"": t} if isinstance(t, Tensor) else t for t in found)
    for name, t in once.items():
        assert twice[name].dtype == t.dtype
        assert (twice[name] - t).norm() <= 4 * torch.finfo(dtype).eps * t.norm(), name


@pytest.mark.parametrize(
    ("seconds", "best"), [((9, 5, 4, 5), 4), ((9, 9.1, 4, 3), 4 * 2), ((9, 10, 1, 1), 1), ((9, 8, 7, 6), 8)]
)
def test_parts_double_for_as_long_as_that_takes_no_longer(
    seconds: tuple[float, ...], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = dict(zip((1, 2, 4, 8), seconds, strict=True))
    monkeypatch.setattr(InParts, "_seconds", lambda self, counts, *batch: {count: of[count] for count in counts})
    seen: list[int] = []

    def run(inputs: Batch, targets: Tensor) -> Tensor:
        seen.append(len(targets))
        return targets * 2

    parts = InParts(run, run, torch.cat, "doubling")
    parts.choose(real(67, 5), real(67))
    seen.clear()
    assert_close(parts(real(67, 5), real(67)), real(67) * 2)
    assert (len(seen), sum(seen)) == (best, 67)
    assert max(seen) - min(seen) <= 1


@pytest.mark.parametrize(
    ("takes", "tries"), [((0.01, 0.0102), 5), ((0.01, 0.012), 2), ((0.012, 0.01), 2), ((0.6, 0.6), 1)]
)
def test_counts_are_timed_until_it_is_clear_which_is_faster(
    takes: tuple[float, float], tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def timed(run: object, like: Tensor) -> float:
        seen.append(takes[len(seen) % 2])
        return seen[-1]

    monkeypatch.setattr("backends.ops.parts.timed", timed)
    parts = InParts(lambda inputs, targets: targets, lambda *batch: None, torch.cat, "nothing")
    assert parts._seconds((1, 2), real(8, 5), real(8)) == dict(zip((1, 2), takes, strict=True))
    assert len(seen) == 2 * tries


def test_what_is_timed_has_run_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """With parts of another size there may be other ways, which are measured when they first run."""
    seen, before = set[int](), list[set[int]]()

    def run(inputs: Batch, targets: Tensor) -> Tensor:
        seen.add(len(targets))
        return targets

    def timed(way: object, like: Tensor) -> float:
        before.append(set(seen))
        return 1.0

    monkeypatch.setattr("backends.ops.parts.timed", timed)
    InParts(run, run, torch.cat, "nothing").choose(real(8, 5), real(8))
    assert before[0] == {8, 4}


def test_no_step_is_run_where_little_memory_is_taken() -> None:
    parts = InParts(lambda inputs, targets: targets, lambda *batch: pytest.fail("a step"), torch.cat, "nothing")
    parts.choose(real(8, 5), real(8))


@pytest.mark.parametrize(
    "lack", [torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")]
)
def test_a_batch_that_is_too_large_for_memory_is_run_in_parts(lack: RuntimeError) -> None:
    def run(inputs: Batch, targets: Tensor) -> Tensor:
        if len(targets) > 20:
            raise lack
        return targets * 2

    parts = InParts(run, run, torch.cat, "doubling")
    parts.choose(real(67, 5), real(67))
    assert_close(parts(real(67, 5), real(67)), real(67) * 2)


def test_what_does_not_fit_later_is_run_in_more_parts() -> None:
    most, seen = 100, []

    def run(inputs: Batch, targets: Tensor) -> Tensor:
        seen.append(len(targets))
        if len(targets) > most:
            raise RuntimeError("can't allocate memory")
        return targets * 2

    parts, inputs, targets = InParts(run, run, torch.cat, "shrinking"), real(67, 5), real(67)
    parts.counts[(signature(inputs), signature(targets), 67)] = 1
    most = 20
    assert_close(parts(inputs, targets), targets * 2)
    seen.clear()
    assert_close(parts(inputs, targets), targets * 2)
    assert max(seen) == 17  # and it is known from then on
    most = 0
    with pytest.raises(RuntimeError, match="can't allocate"):
        parts(inputs, targets)


def test_inputs_that_have_been_changed_are_not_run_again() -> None:
    seen = []

    def run(inputs: Tensor, targets: Tensor) -> Tensor:
        inputs.add_(1)
        seen.append(len(targets))
        raise RuntimeError("can't allocate memory")

    parts = InParts(run, run, torch.cat, "changing")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="can't allocate"):
        parts(real(8, 5), real(8))
    assert seen == [8]


def test_memory_of_what_has_been_tried_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    released, fits = [], 100

    def run(inputs: Batch, targets: Tensor) -> Tensor:
        if len(targets) > fits:
            raise RuntimeError("can't allocate memory")
        return targets

    monkeypatch.setattr("backends.ops.parts.release", lambda: released.append(fits))
    parts = InParts(run, run, torch.cat, "trying")
    parts.choose(real(8, 5), real(8))
    fits = 1
    parts(real(8, 5), real(8))
    assert released[0] == 100  # once it is known how many parts are best
    assert released[1:]  # and when they do not fit
    assert set(released[1:]) == {1}


def test_what_did_not_fit_is_let_go_before_the_next_try() -> None:
    """An exception and the frames that it went through hold each other, and with them the tensors of the pass."""
    held, at_a_time = WeakSet[Memory](), list[int]()

    def run(inputs: Batch, targets: Tensor) -> Tensor:
        memory = Memory()
        held.add(memory)
        at_a_time.append(len(held))
        if len(targets) > 20:
            memory.itself = memory
            raise torch.OutOfMemoryError
        return targets

    gc.disable()
    try:
        InParts(run, run, torch.cat, "holding").choose(real(67, 5), real(67))
    finally:
        gc.enable()
    assert len(at_a_time) > 3
    assert set(at_a_time) == {1}


def test_inputs_are_not_needed_twice_where_there_is_no_room_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(t: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    parts = InParts(lambda inputs, targets: targets, lambda inputs, targets: targets, torch.cat, "nothing")
    with monkeypatch.context() as patched:
        patched.setattr("torch.clone", no_room)
        parts.choose(real(16, 5), real(16))
    assert_close(parts(real(16, 5), real(16)), real(16))


class Memory:
    """Something whose lifetime is watched."""

    itself: "Memory"


def test_every_form_of_more_than_one_sample_is_looked_at_once_and_sizes_that_are_near_are_one() -> None:
    parts = InParts(lambda inputs, targets: targets, lambda inputs, targets: targets, torch.cat, "nothing")
    assert parts.knows(real(1, 5), real(1))
    assert not parts.knows(real(16, 5), real(16))
    parts.choose(real(16, 5), real(16))
    assert parts.knows(real(16, 5), real(16))
    assert parts.knows(real(17, 5), real(17))
    assert not parts.knows(real(15, 5), real(15))
    assert not parts.knows(real(18, 5), real(18))
    assert not parts.knows(real(16, 6), real(16))
    assert not parts.knows(real(16, 5), real(16, 2))


def test_time_alone_divides_no_batch_into_very_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InParts, "_seconds", lambda self, counts, *batch: {counts[0]: 2.0, counts[1]: 1.0})
    for samples, best in [(7, 1), (8, 2), (15, 2), (16, 4)]:
        parts = InParts(lambda inputs, targets: targets, lambda inputs, targets: targets, torch.cat, "small")
        parts.choose(real(samples, 5), real(samples))
        assert list(parts.counts.values()) == [best]


def held(samples: int, each: int) -> list[Tensor]:
    """Return tensors that take so many bytes a sample."""
    return [torch.zeros(each, dtype=torch.uint8, device=DEVICE) for _ in range(samples)]


@pytest.mark.parametrize(("each", "parts"), [(12, 1), (14, 2), (40, 4), (300, 16)])
def test_there_are_as_many_parts_as_memory_asks_for(each: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backends.ops.parts.FREE", 0)
    monkeypatch.setattr(InParts, "_seconds", lambda self, counts, *batch: {counts[0]: 1.0, counts[1]: 2.0})

    def run(inputs: Batch, targets: Tensor) -> Tensor:
        assert held(len(targets), each * 1000)
        return targets

    def step(inputs: Batch, targets: Tensor) -> object:
        return held(len(targets), 10000)

    found = InParts(run, step, torch.cat, "held")
    found.choose(real(16, 5), real(16))
    assert list(found.counts.values()) == [parts]


def test_there_are_no_more_parts_than_save_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a result takes, parts do not make less."""
    monkeypatch.setattr("backends.ops.parts.FREE", 0)
    monkeypatch.setattr(InParts, "_seconds", lambda self, counts, *batch: {counts[0]: 1.0, counts[1]: 2.0})

    def run(inputs: Batch, targets: Tensor) -> Tensor:
        assert held(1, 90000)
        assert held(1, 50000) + held(len(targets), 10000)
        return targets

    found = InParts(run, lambda inputs, targets: held(1, 1000), torch.cat, "held")
    found.choose(real(16, 5), real(16))
    assert list(found.counts.values()) == [4]


def test_parts_within_the_bound_are_taken_though_they_save_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backends.ops.parts.FREE", 0)
    monkeypatch.setattr(InParts, "_seconds", lambda self, counts, *batch: {counts[0]: 1.0, counts[1]: 2.0})

    def run(inputs: Batch, targets: Tensor) -> Tensor:
        assert held(1, {32: 131000, 16: 129000, 8: 1}[len(targets)])
        return targets

    found = InParts(run, lambda inputs, targets: held(1, 100000), torch.cat, "held")
    found.choose(real(32, 5), real(32))
    assert list(found.counts.values()) == [2]


@pytest.mark.parametrize(("seconds", "best"), [(2.0, 1), (0.5, 4)])
def test_parts_that_keep_more_are_taken_if_they_are_faster_and_there_is_room(
    seconds: float, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backends.ops.parts.FREE", 0)
    monkeypatch.setattr(InParts, "_seconds", lambda self, counts, *batch: {counts[0]: 1.0, counts[1]: seconds})

    def run(inputs: Batch, targets: Tensor) -> Tensor:
        assert held(1, {32: 100000, 16: 110000, 8: 130000, 4: 131000}[len(targets)])
        return targets

    found = InParts(run, lambda inputs, targets: held(1, 100000), torch.cat, "held")
    found.choose(real(32, 5), real(32))
    assert list(found.counts.values()) == [best]


def test_memory_that_a_process_keeps_anyway_is_no_reason_for_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InParts, "_seconds", lambda self, counts, *batch: {counts[0]: 1.0, counts[1]: 2.0})
    found = InParts(lambda inputs, targets: held(16, 1000)[0], lambda inputs, targets: None, torch.cat, "held")
    found.choose(real(16, 5), real(16))
    assert list(found.counts.values()) == [1]


def test_what_fails_where_memory_is_measured_is_run_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(inputs: Batch, targets: Tensor) -> Tensor:
        raise ValueError

    monkeypatch.setattr("backends.ops.parts.FREE", 0)
    found = InParts(lambda inputs, targets: targets + 1, fails, torch.cat, "failing")
    found.choose(real(5, 5), real(5))
    assert list(found.counts.values()) == [1]


@pytest.mark.parametrize("quantity", ["norms", "clipped_sum"])
def test_random_ops_go_on_from_part_to_part_and_a_first_call_draws_as_later_ones_do(quantity: str) -> None:
    model = nn.Sequential(linear(5, 64), nn.Dropout(), linear(64, 5)).to(DEVICE, torch.float64)
    fn = getattr(get_backend("bookkeeping"), quantity)(model, squares)
    inputs, targets = real(1, 5).expand(32, 5).clone(), real(1).expand(32).clone()
    first, second = fn(inputs, targets), fn(inputs, targets)
    if quantity == "norms":
        assert_close(first, second)
        assert len(first.unique()) == 32, "samples have masks of their own"
    else:
        for name, t in first.items():
            assert_close(second[name], t)
