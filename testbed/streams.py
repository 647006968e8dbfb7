"""The standard streams of the command line, in whatever state a shell has left them."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Lossy(io.TextIOWrapper):
    """Text of which is dropped what cannot be written, on a full disk, say: progress is no reason to end a run."""

    def write(self, text: str, /) -> int:
        """Return how much there was to write."""
        with self._dropping():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Write what waits to be written, if that can be."""
        with self._dropping():
            super().flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, BrokenPipeError) and _is_stdout(self.fileno()):
                raise  # as in `… 2>&1 | head`: whoever reads has enough


def open_closed() -> None:
    """Open what a shell has closed of stdin, stdout and stderr (`>&-`): what is read is empty, what is written is lost.

    Their numbers would go to the next files that are opened, and a child process would take one of those for its input.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the least number that is free: this one
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  as long as the process lives
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def drop_what_stderr_cannot_take() -> None:
    """Let no run fail because stderr cannot be written; another stream that stands in for it is left alone."""
    theirs = sys.stderr
    if isinstance(theirs, io.TextIOWrapper) and theirs is sys.__stderr__:
        file = open(theirs.fileno(), "wb", closefd=False)  # noqa: SIM115  as long as the process lives
        sys.stderr = _Lossy(file, theirs.encoding, theirs.errors, line_buffering=True)


def _is_stdout(number: int) -> bool:
    """Return whether a file that is open is also where stdout goes."""
    try:
        return os.path.samestat(os.fstat(number), os.fstat(1))
    except OSError:
        return False
