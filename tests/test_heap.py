"""What becomes of freed memory."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from backends import bookkeeping, get_backend, heap
from backends.heap import keep_freed
from testbed import memory
from testbed.agreement import Calibrated
from testbed.cell import Cell
from testbed.problems import Problem
from testbed.processes.host import Host, Setup
from tests.cases import squares

ROOT = Path(__file__).parent.parent
CALLS = """
import ctypes, resource
from backends.heap import give_back, keep_freed

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [ctypes.c_void_p(libc.malloc(2**22)) for _ in range(12)]
    for block in blocks:
        ctypes.memset(block, 1, 2**22)
    for block in reversed(blocks):
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed()
faults()
faults()
again = faults()
give_back()
print(first, again, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    done = subprocess.check_output([sys.executable, "-c", CALLS], text=True, cwd=ROOT)
    first, again, given_back = map(int, done.split())
    if first == 0:
        pytest.skip("this system counts no page faults")
    assert given_back > 12000  # pages; a call writes 12288
    assert again < 100


HOLES = """
import ctypes, resource
from backends.heap import keep_freed, nothing_kept

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
MIB = 2**20

def leave_a_hole():
    blocks = [ctypes.c_void_p(libc.malloc(16 * MIB)) for _ in range(12)]
    held = libc.malloc(MIB // 2)
    for block in blocks:
        libc.free(block)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(100 * MIB))
    ctypes.memset(block, 1, 100 * MIB)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed()
with nothing_kept():
    leave_a_hole()
found = [faults() for _ in range(3)]
leave_a_hole()
print(min(found), [faults() for _ in range(3)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_what_was_freed_where_nothing_is_kept_leaves_no_hole_for_larger_blocks() -> None:
    """25600 pages are written; without that, a hole in the heap serves the block from the second call on."""
    always, with_hole = map(int, subprocess.check_output([sys.executable, "-c", HOLES], text=True, cwd=ROOT).split())
    if with_hole > 100:
        pytest.skip("here blocks that are in use leave no holes")
    assert always > 25000


@pytest.mark.usefixtures("own_random_state")
def test_what_a_host_frees_is_kept_for_timed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(heap, "_keep", lambda *sizes: set_to.append(sizes))
    x, cell = torch.ones(4, 3), Cell("naive", "norms")
    host = Host(Setup(lambda: Problem(nn.Linear(3, 2), squares, x, x[:, :2], x, x[:, :2]), 0, Calibrated()))
    for step in (lambda: host.begin("norms", {}), lambda: host.start(cell), host.bounds):
        step()
        assert set_to == [(heap.SMALL, heap.SMALL), (heap.LARGEST, heap.KEPT)]
        set_to.clear()
    host.time(cell.label)
    assert set_to == []


@pytest.mark.usefixtures("own_random_state")
def test_bookkeeping_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(bookkeeping, "keep_freed", lambda: kept.append(True))
    get_backend("bookkeeping").norms(nn.Linear(2, 2), squares)
    assert kept


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_kept_memory_counts_where_it_is_used_again() -> None:
    def call() -> None:
        held = [torch.ones(2**20) for _ in range(12)]
        assert len(held) == 12

    keep_freed()
    call()
    grown = memory.peak(call, torch.device("cpu"))["peak_bytes"]
    assert grown is None or grown > 40e6  # None where a container forbids to measure it; a call writes 50 MB


IN_HOLES = """
import torch
from backends.heap import keep_freed, nothing_kept
from testbed.memory import peak

MIB = 2**18  # of float32

def call():
    small = [torch.ones(MIB // 2) for _ in range(80)]
    held = small[::10]
    del small
    large = [torch.ones(12 * MIB) for _ in range(5)]

keep_freed()
blocks = [torch.ones(MIB) for _ in range(60)]
held = blocks[::10]
del blocks
with nothing_kept():
    print(peak(call, torch.device("cpu"))["peak_bytes"])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_holes_in_the_heap_do_not_count_as_memory_of_a_call() -> None:
    """It holds 64 MiB at most, after 40 MiB that fit into holes and leave others."""
    grown = subprocess.check_output([sys.executable, "-c", IN_HOLES], text=True, cwd=ROOT).strip()
    assert grown == "None" or 60 * 2**20 < int(grown) < 70 * 2**20  # None where a container forbids to measure it


@pytest.mark.parametrize(
    ("call", "end"),
    [
        ("sys.exit('enough')", "enough"),
        ("[][0]", "IndexError: list index out of range"),
        ("(os.kill(os.getpid(), signal.SIGINT), time.sleep(300))", "KeyboardInterrupt"),
    ],
)
def test_what_ends_a_call_while_its_memory_is_measured_is_heard_at_once(call: str, end: str) -> None:
    imports = "import os, signal, sys, time, torch; from testbed.memory import peak"
    code = f"{imports}; peak(lambda: {call}, torch.device('cpu'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100, check=False
    )
    assert done.returncode != 0
    assert done.stderr.strip().endswith(end)
