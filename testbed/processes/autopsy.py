"""How a process came to its end, in words."""

import ctypes
import re
import signal
from pathlib import Path

NO_MEMORY = re.compile(r"bad_alloc|[Cc]annot allocate memory|can't allocate memory|MemoryError|Thread creation failed")
FAULT = "Fatal Python error: "  # `faulthandler` writes so, and then where
CURRENT = "Current thread "  # the one that crashed, among others that wait
PLACE = re.compile(r'^  File "(?:.*/)?([^"/]+)", line (\d+) in (.+)$', re.MULTILINE)
LONGEST = 200  # characters of a line that are quoted
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def cause(code: int | None, said: str, oom_killed: bool) -> tuple[str, str]:
    """Return the status and the one-line reason of a process that ended without an answer.

    Args:
        code: Its exit code, negative for a signal; None where it still ran.
        said: The end of what it wrote.
        oom_killed: Whether the kernel has killed a process for want of memory meanwhile.
    """
    if code is None:
        how, status = "broke the connection", "crash"
    elif code < 0:
        how, status = f"killed by {_signal(-code)}", "crash"
        if oom_killed and -code == signal.SIGKILL:
            how, status = f"{how}: the system was out of memory", "oom"
    else:
        how, status = f"ended its process with exit code {code}", "crash"
    written, _, fault = said.partition(FAULT)
    if NO_MEMORY.search(written):
        status = "oom"
    if place := PLACE.search(fault.partition(CURRENT)[2]):
        how += f" in {place[3]} ({place[1]}:{place[2]})"
    line = last_line(written)
    return status, f"{how}; its last output: {line}" if line else how


def last_line(said: str) -> str:
    """Return the last line that says something, cut where it is long."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return "".join(c if c.isprintable() else "?" for c in lines[-1][:LONGEST]) if lines else ""


def oom_kills() -> int:
    """Return how many processes the kernel has killed for want of memory; 0 where it does not say."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def die_with_parent_thread() -> None:
    """Ask Linux to kill this process when the thread that has started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} ({(signal.strsignal(number) or '').lower()})"
    except ValueError:
        return f"signal {number}"
