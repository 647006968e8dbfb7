"""The largest batch that fits: the search for it, and a real one with backends that run out of memory."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from backends.base import Unsupported
from testbed.__main__ import main
from testbed.cell import Cell
from testbed.config.experiment import Experiment
from testbed.frontier import FINAL, PRECISION, Frontier, Try, plan, search
from testbed.outcome import status_of
from tests.cases import DEVICE
from tests.processes import SMALL, family, gone, start, wait_for

sizes = st.integers(1, 10**6)


def tried(true: int, start: int, most: int, status: str = "oom") -> tuple[int, list[int]]:
    """Search where batches up to a true size fit; return what was found and the sizes that were tried."""
    asked: list[int] = []

    def attempt(n: int) -> str:
        asked.append(n)
        return "ok" if n <= true else status

    return search(attempt, min(start, most), most), asked


@given(st.integers(0, 10**6), sizes, sizes)
@example(0, 1, 1)
@example(0, 64, 64)
@example(7, 7, 7)
def test_what_is_found_fits_and_a_slightly_larger_one_was_tried_in_vain(true: int, start: int, most: int) -> None:
    found, asked = tried(true, start, most)
    assert found == max([n for n in asked if n <= true], default=0)
    larger = min([n for n in asked if n > true], default=None)
    assert found == most if larger is None else larger - found <= max(1, PRECISION * found)


@given(st.integers(0, 10**6), sizes, sizes)
def test_no_size_is_tried_twice_or_beyond_the_most_and_few_are_tried(true: int, start: int, most: int) -> None:
    _, asked = tried(true, start, most)
    assert len(set(asked)) == len(asked)
    assert 1 <= min(asked) <= max(asked) <= most
    assert len(asked) <= 21 + 20  # 2^20 is beyond a million: so many doublings, or halvings where the start is too much


@pytest.mark.parametrize("status", FINAL)
def test_what_no_further_try_would_say_more_about_ends_the_search(status: str) -> None:
    assert tried(5, 1, 64, status) == (4, [1, 2, 4, 8])


def test_doubling_then_bisection() -> None:
    assert tried(11, 1, 64) == (11, [1, 2, 4, 8, 16, 12, 10, 11])


def frontier(*tries: Try, most: int = 8) -> Frontier:
    found = plan(Experiment.model_validate({"problems": (PROBLEM,)}), torch.device("cpu"), most)[0]
    return replace(found, tries=list(tries))


PROBLEM: dict[str, Any] = {"model": "logistic", "data": "random", "loss": "nll"}
OK, OOM, SLOW = Try(4, seconds=1.0), Try(5, "oom"), Try(8, "timeout")


@pytest.mark.parametrize(
    ("tries", "end", "largest", "is_bounded", "failed"),
    [
        ([OK, Try(8, "oom"), OOM], "oom", 4, True, False),
        ([OK, SLOW], "timeout", 4, False, False),
        ([OK, Try(8, "problem")], "problem", 4, False, False),
        ([OK, replace(OK, n=8)], "--most", 8, False, False),
        ([OOM], "oom", 0, True, True),
        ([SLOW], "timeout", 0, False, True),
        ([Try(1, "unsupported")], "unsupported", 0, True, False),
        ([OK, Try(8, "crash")], "crash", 4, True, True),
        ([OK, Try(8, "interrupted")], "interrupted", 4, False, False),
        ([], "interrupted", 0, False, False),
    ],
)
def test_what_ended_a_search(tries: list[Try], end: str, largest: int, is_bounded: bool, failed: bool) -> None:
    found = frontier(*tries)
    assert (found.end.status, found.largest, found.is_bounded, found.failed) == (end, largest, is_bounded, failed)


def test_problems_that_differ_in_batch_size_and_training_are_one() -> None:
    problems = tuple({**PROBLEM, "batch_size": n, "train_steps": n} for n in (1, 2))
    asked = Experiment.model_validate({"problems": problems, "backends": ("naive",), "quantities": ("grads", "gram")})
    found = plan(asked, torch.device("cpu"), 8)
    assert [f.cell for f in found] == [None, Cell("naive", "grads"), Cell("naive", "gram")]
    assert not any("batch_size" in f.about for f in found)


@pytest.mark.parametrize(
    "lack",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("std::bad_alloc"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_lack_of_memory_is_no_refusal(lack: Exception) -> None:
    refusal = Unsupported("the library cannot")
    refusal.__cause__ = lack
    assert status_of(lack) == status_of(refusal) == ("oom", str(lack))


MINE = """
from dataclasses import dataclass
import torch
from backends import get_backend
from backends.base import Backend, Unsupported, register

def plant(name, deed):
    @register(name)
    @dataclass(frozen=True)
    class Planted(Backend):
        def grads(self, model, loss_fn):
            right = get_backend("vmap").grads(model, loss_fn)
            def fn(inputs, targets):
                held = deed(targets)
                return right(inputs, targets)
            return fn
    Planted.__qualname__ = f"planted {name}"

def above_one(on):
    if len(on) > 1:
        raise MemoryError(f"no room for {len(on)}")

def refuse(on):
    raise Unsupported("`model`: not today")

plant("above_one", above_one)
plant("needs_memory", lambda on: torch.empty(len(on), 3_000_000_000, dtype=torch.uint8, device=on.device))
plant("refuses", refuse)
"""
LIMITED = f"""{SMALL.replace("cpu", DEVICE.type)}
limits: {{timeout_s: 60, memory_gb: 5}}
backends: [above_one, needs_memory, refuses]
"""


class Ran(NamedTuple):
    """A search that has ended."""

    code: int
    out: str
    tries: list[dict[str, Any]]
    folder: Path


def begin(folder: Path, *options: object) -> Any:
    (folder / "e.yaml").write_text(LIMITED, encoding="utf-8")
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    return start("frontier", folder / "e.yaml", "--plugin", folder / "mine.py", "--out", folder / "run", *options)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("frontier")
    with begin(folder, "--start", 2, "--most", 2) as process:
        out, err = process.communicate()
    assert "Traceback" not in out + err
    lines = (folder / "run" / "frontier.jsonl").read_text(encoding="utf-8").splitlines()
    return Ran(process.returncode, out, [json.loads(line) for line in lines], folder / "run")


linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and signals are Linux'")


@linux
def test_every_try_is_on_disk_with_status_and_reason(ran: Ran) -> None:
    found = [(t["backend"], t["n"], t["status"]) for t in ran.tries]
    assert found == [
        ("ordinary step", 2, "ok"),
        ("above_one", 2, "oom"),
        ("above_one", 1, "ok"),
        ("needs_memory", 2, "oom"),
        ("needs_memory", 1, "ok"),
        ("refuses", 2, "unsupported"),
    ]
    assert ("CUDA out of memory" if DEVICE.type == "cuda" else "can't allocate memory") in ran.tries[3]["reason"]
    assert ran.tries[3]["reason"].endswith("(limits.memory_gb: 5)")
    assert all((t["per_sample_s"] is not None) == (t["status"] == "ok") for t in ran.tries)
    assert all(t["problem"]["batch_size"] == t["n"] for t in ran.tries)


@linux
@pytest.mark.parametrize(
    ("backend", "cells"),
    [
        ("above_one", ["1", "oom", "≤ 0.50"]),
        ("needs_memory", ["1", "oom", "≤ 0.50"]),
        ("refuses", ["–", "unsupported", "–"]),
        ("ordinary step", ["≥ 2", "--most", "–"]),
    ],
)
def test_the_table_says_what_fits_and_what_ended_it(ran: Ran, backend: str, cells: list[str]) -> None:
    (line,) = [line for line in ran.out.splitlines() if line.startswith(f"{backend} ")]
    first, second, last = cells
    assert line.removeprefix(backend).split(second)[0].strip() == first
    assert line.split(second)[1].endswith(last)
    assert max(map(len, ran.out.splitlines())) <= 80 or str(ran.folder) in ran.out


@linux
def test_what_was_looked_for_is_no_failure(ran: Ran) -> None:
    assert ran.code == 0
    assert "• refuses, N=2: `model`: not today" in ran.out
    assert "No result was checked here" in ran.out


@linux
@pytest.mark.parametrize("file", ["figures/frontier.png", "figures/frontier.svg", "experiment.yaml"])
def test_figure_and_experiment_lie_beside_the_tries(ran: Ran, file: str) -> None:
    assert (ran.folder / file).stat().st_size > 0


@linux
@pytest.mark.parametrize("words", ["does every sample have", "ordinary step"])
def test_ctrl_c_prints_what_was_found(tmp_path: Path, words: str) -> None:
    with begin(tmp_path) as process:
        wait_for(process, words)
        time.sleep(1)  # what forks the tries' processes imports PyTorch now, on CUDA the try's own does; or a try runs
        left = family(process)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, err) == (130, "")
    assert f"interrupted; what was found is in {tmp_path / 'run'}\n" in out
    assert any(line.startswith("ordinary step") and "interrupted" in line for line in out.splitlines())
    assert gone(left)


STOPPED = """
import multiprocessing, os, signal
from multiprocessing.context import ForkServerProcess
from testbed.processes import child

calls = []

def stopped(call, after):
    def stopping(*arguments):
        calls.append(call)
        here = len(calls) == WHICH
        if here and not after:
            os.kill(os.getpid(), signal.SIGTERM)
        result = call(*arguments)
        if here and after:
            os.kill(os.getpid(), signal.SIGTERM)
        return result
    return stopping

if multiprocessing.parent_process() is None:
"""
IN_A_START = "    ForkServerProcess._Popen = staticmethod(stopped(ForkServerProcess._Popen, after=False))"
AFTER_A_START = "    child.Output = stopped(child.Output, after=True)"  # the child runs, and nobody has it yet


@linux
@pytest.mark.parametrize(
    ("moment", "which"),
    [(IN_A_START, 2), (IN_A_START, 4), (AFTER_A_START, 1), (AFTER_A_START, 3)],
    ids=["in the first start", "in a try's start", "after the first start", "after a try's start"],
)
def test_a_signal_in_the_moment_of_a_start_prints_what_was_found(tmp_path: Path, moment: str, which: int) -> None:
    (tmp_path / "stop.py").write_text(STOPPED.replace("WHICH", str(which)) + moment, encoding="utf-8")
    with begin(tmp_path, "--plugin", tmp_path / "stop.py", "--device", "cpu", "--start", 2) as process:
        out, err = process.communicate()
    assert (process.returncode, "Traceback" in err) == (130, False)
    assert f"interrupted; what was found is in {tmp_path / 'run'}\n" in out
    assert any(line.startswith("ordinary step") and "interrupted" in line for line in out.splitlines())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--start", "9", "--most", "8"], "--start and --most: should be 1 ≤ start ≤ most, found --start 9, --most 8"),
        (
            ["--only", "nave"],
            "--only: unknown backend 'nave' (did you mean 'naive'?); available: naive in this experiment",
        ),
        (["--out", "full"], "--out full: holds a run already; give another folder"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/frontier.jsonl").write_text("a try\n", encoding="utf-8")
    Path("e.yaml").write_text(f"{SMALL}\nbackends: [naive]\n", encoding="utf-8")
    assert main(["frontier", "e.yaml", *options]) == 2
    assert capsys.readouterr() == ("", f"testbed: error: {message}\n")
