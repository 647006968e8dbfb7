"""`python -m testbed compare`: what it calls better, worse, or neither, and with which exit code it ends."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import testbed.__main__ as command_line
from testbed.comparison import compare, differences, unpaired
from testbed.records import Record, RecordFile
from tests.made_up import MACHINE, record, times

BEFORE = [record("naive", 0.2), record()]
ENDS = {
    "nothing": (record(), "can't tell", 0),
    "half as fast": (record(median=0.2), "worse", 4),
    "twice as fast": (record(median=0.05), "better", 0),
    "within both floors": (record(median=0.103), "can't tell", 0),
    "beyond both floors": (record(median=0.12), "worse", 4),
    "wrong now": (record(status="disagrees"), "worse", 4),
    "refuses now": (record(status="unsupported"), "worse", 4),
    "fails now": (record(status="oom"), "worse", 4),
    "interrupted now": (record(status="interrupted"), "can't tell", 0),
}  # what became of vmap: its new record, the verdict, the exit code


def slower_machine(one: Record, factor: float) -> Record:
    """Return a record of the same code on a machine on which everything takes so many times as long."""
    timing = one.timing | times(factor * one.timing["median_s"])
    step = one.timing["ordinary"] | times(factor * one.timing["ordinary"]["median_s"])
    return replace(one, timing=timing | {"ordinary": step})


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that compares two lists of records on the command line."""

    def ran(old: Sequence[Record], new: Sequence[Record], *options: str) -> tuple[int, str, str]:
        for name, records in (("old", old), ("new", new)):
            (tmp_path / name).mkdir()
            for one in records:
                RecordFile(tmp_path / name / "results.jsonl").append(one)
        code = command_line.main(["compare", str(tmp_path / "old"), str(tmp_path / "new"), *options])
        return (code, *capsys.readouterr())

    return ran


@pytest.mark.parametrize("what", ENDS)
def test_verdict_and_exit_code(what: str, run: Any) -> None:
    after, verdict, expected = ENDS[what]
    code, out, _ = run(BEFORE, [BEFORE[0], after])
    assert code == expected
    assert any(line.startswith("vmap") and verdict in line for line in out.splitlines())


def test_the_count_says_which_line_is_not_in_it(run: Any) -> None:
    _, out, _ = run(BEFORE, BEFORE)
    assert "• 2 can't tell. The ordinary step is not counted.\n" in out


def test_what_is_mended_is_better() -> None:
    (change,) = compare([record(status="error")], [record()])
    assert (change.verdict, change.old, change.new) == ("better", "error", 0.1)


@pytest.mark.parametrize("status", ["unsupported", "error"])
def test_what_was_never_right_is_the_same(status: str) -> None:
    (change,) = compare([record(status="unsupported")], [record(status=status)])
    assert change.verdict == "same"


def test_cells_come_and_go() -> None:
    found = compare([record(), record(n=8)], [record(), record("mine", status="disagrees"), record(quantity="norms")])
    assert [(c.backend, c.quantity, c.verdict) for c in found] == [
        ("vmap", "grads", "can't tell"),
        ("mine", "grads", "new"),
        ("vmap", "norms", "new"),
        ("vmap", "grads", "gone"),
    ]


def test_a_slower_machine_is_no_cells_fault(run: Any) -> None:
    code, out, _ = run(BEFORE, [slower_machine(r, 1.5) for r in BEFORE])
    assert code == 0
    assert "The ordinary step, which no backend's code is in, takes 1.50 times as long" in out.replace("\n", " ")


def test_a_slower_cell_on_a_slower_machine_is_worse(run: Any) -> None:
    assert run(BEFORE, [slower_machine(r, 1.5) for r in (BEFORE[0], record(median=0.2))])[0] == 4


def test_other_devices_are_refused_unless_told(run: Any) -> None:
    code, _, err = run(BEFORE, [replace(r, environment=MACHINE | {"processor": "Loom"}) for r in BEFORE])
    assert code == 2
    assert "different devices: Abacus in " in err
    assert err.count("\n") == 1


def test_across_devices_seconds_count(run: Any) -> None:
    gpu = {**MACHINE, "device": "cuda", "gpu": {"name": "Loom"}}
    faster = [replace(slower_machine(r, 0.1), environment=gpu, problem=r.problem | {"device": "cuda"}) for r in BEFORE]
    code, out, _ = run(BEFORE, faster, "--across-devices")
    assert code == 0
    assert "2 better." in out


def test_what_disturbed_a_run_is_no_difference_of_its_environment() -> None:
    old, new = (record(environment=MACHINE | {"disturbances": d}) for d in (["other programs used 1.0 of 2 cores"], []))
    assert differences([old], [new]) == {}


def test_differences_come_first(run: Any) -> None:
    new = [replace(r, environment=MACHINE | {"threads": 8, "versions": {"torch": "10"}}) for r in BEFORE]
    lines = run(BEFORE, new)[1].splitlines()
    assert lines[2:5] == ["environment:", "  threads: 1 → 8", "  versions.torch: 9.9 → 10"]


def test_momentary_clocks_are_no_difference() -> None:
    old, new = (record(environment=MACHINE | {"gpu": {"name": "Loom", "clocks": c}}) for c in ("1 MHz", "2 MHz"))
    assert differences([old], [new]) == {}


def test_a_changed_file_is_said(run: Any) -> None:
    out = run([record()], [record(environment=MACHINE | {"backend_source": "2"})])[1]
    assert "vmap: its file was changed" in out


def test_an_earlier_schema_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = record()
    problem = {key: value for key, value in new.problem.items() if key not in ("dtype", "device")}
    old = {"backend": "vmap", "quantity": "grads", "status": "ok", "problem": problem, "timing": {"median_s": 0.01}}
    (tmp_path / "old.jsonl").write_text(json.dumps(old | {"environment": {"processor": "Abacus"}}), encoding="utf-8")
    (tmp_path / "new.jsonl").write_text(json.dumps(asdict(new)) + "\n", encoding="utf-8")
    assert command_line.main(["compare", str(tmp_path / "old.jsonl"), str(tmp_path / "new.jsonl")]) == 4
    out = capsys.readouterr().out
    assert "A run has no A/A floor" in out
    assert "1 worse." in out


@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_path_is_one_line(which: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RecordFile(tmp_path / "results.jsonl").append(record())
    paths = [str(tmp_path), str(tmp_path)]
    paths[which] = "nowhere"
    assert command_line.main(["compare", *paths]) == 2
    assert capsys.readouterr().err == "testbed: error: nowhere: there is no such file or folder\n"


def test_interval_holds_the_ratio_and_grows_with_the_noise() -> None:
    quiet, loud = (unpaired([2.0, 2 + d, 2 - d] * 5, [1.0, 1 + d, 1 - d] * 5) for d in (0.01, 0.2))
    assert quiet.low <= 2 <= quiet.high
    assert loud.high - loud.low > quiet.high - quiet.low
