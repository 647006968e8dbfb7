"""What becomes of freed memory."""

import platform
import subprocess
import sys

import pytest

CALLS = """
import resource, sys, torch
from backends.heap import give_back, keep_freed

def faults(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def call():
    held = [torch.ones(2**20) for _ in range(12)]

if sys.argv[1] == "kept":
    keep_freed()
for _ in range(4):
    call()
again = faults(call)
give_back()
print(again, faults(call))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_is_kept_until_it_is_given_back(kept: bool) -> None:
    process = [sys.executable, "-c", CALLS, "kept" if kept else "as it is"]
    again, given_back = map(int, subprocess.check_output(process, text=True).split())
    assert given_back > 12000  # pages; a call writes 12288
    assert (again < 100) == kept
