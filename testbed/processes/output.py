"""What a child process writes: all of it is read, the end of it is kept."""

import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from testbed.processes import autopsy

TAIL = 2**14  # bytes kept of what a process writes
FLOOD = 2**26  # bytes that a process may write in a step
CLOSING_S = 1.0  # to read what is left in the pipe of a process that has ended


class Output:
    """Reads all that a process writes, so that it never waits for a reader, and keeps the end of it."""

    def __init__(self, reader: Connection, on_flood: Callable[[], None]) -> None:
        self._reader, self._on_flood = reader, on_flood
        self._kept, self._written, self.flooded = b"", 0, False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def tail(self) -> str:
        """The end of what was written."""
        return self._kept.decode(errors="replace")

    def last_words(self) -> str:
        """Return the last line that was written, to be put after a reason."""
        line = autopsy.last_line(self.tail)
        return f"; its last output: {line}" if line else ""

    def begin(self) -> None:
        """Begin to count for a step."""
        self._written = 0

    def close(self) -> None:
        """Wait until all is read; who holds the pipe open beyond its process is not waited for."""
        self._thread.join(CLOSING_S)
        if not self._thread.is_alive():
            self._reader.close()

    def _read(self) -> None:
        while part := self._part():
            self._kept = (self._kept + part)[-TAIL:]
            self._written += len(part)
            if self._written > FLOOD and not self.flooded:
                self.flooded = True
                self._on_flood()

    def _part(self) -> bytes:
        try:
            return os.read(self._reader.fileno(), 2**16)
        except OSError:
            return b""
