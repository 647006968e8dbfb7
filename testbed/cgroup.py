"""The memory that a control group, a container's say, leaves to its processes."""

from collections.abc import Callable
from pathlib import Path

FOLDER = "/sys/fs/cgroup"


def read_file(path: str) -> str | None:
    """Return a file's text; None where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def memory(available: int, total: int, read: Callable[[str], str | None] = read_file) -> tuple[int, int]:
    """Return the bytes that are available and in total, where the system has as many as are given.

    What was read from files and has not been used for long is counted in the group's use, but given up for the asking.
    """
    most = (read(f"{FOLDER}/memory.max") or "").strip()
    if not most.isdigit() or int(most) >= total:  # "max" is no number
        return available, total
    used = int(read(f"{FOLDER}/memory.current") or 0)
    lines = (line.split() for line in (read(f"{FOLDER}/memory.stat") or "").splitlines())
    given_up = sum(int(line[1]) for line in lines if line[:1] == ["inactive_file"])
    return max(0, min(available, int(most) - used + given_up)), int(most)
