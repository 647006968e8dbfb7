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
