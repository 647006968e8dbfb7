"""What one process has computed and others want: a folder of tensors that is mapped into memory, not sent."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeVar

import torch
from filelock import FileLock, Timeout

T = TypeVar("T")
PREFIX = "testbed-"
LOCK = "lock"


class Store:
    """A folder of results by name. Only one process works at a time, so that none waits for another's result.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def kept(self, name: str, compute: Callable[[], T], *, mapped: bool = True) -> T:
        """Return what is kept under a name; what is not yet, is computed and kept.

        What cannot be kept (the disk is full, a model cannot be pickled) is computed by everybody who asks.

        Args:
            name: A file's name without an ending.
            compute: Computes it.
            mapped: Whether its tensors stay in the file until they are read, shared by all processes. What is timed
                must not: it would be read from other pages than memory that was allocated.
        """
        file = self.folder / f"{name}.pt"
        if file.exists():
            found: T = torch.load(file, mmap=mapped, weights_only=False)  # this folder is our own
            return found
        found = compute()
        partial = file.with_suffix(".partial")
        checksums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # they take ten times as long as the writing
        try:
            torch.save(found, partial)
            partial.replace(file)
        except Exception:
            partial.unlink(missing_ok=True)
        finally:
            torch.serialization.set_crc32_options(checksums)
        return found

    def drop(self, pattern: str) -> None:
        """Remove what is kept under the names that match; whoever has it mapped keeps it."""
        for file in self.folder.glob(f"{pattern}.pt"):
            file.unlink(missing_ok=True)


class TemporaryStore(Store):
    """A store that is removed at the end, or, where its process was killed, by the next one that is made."""

    def __init__(self) -> None:
        _sweep()
        super().__init__(Path(tempfile.mkdtemp(prefix=PREFIX)))
        self._lock = FileLock(self.folder / LOCK)
        self._lock.acquire()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)


def _sweep() -> None:
    """Remove the stores of processes that were killed: nobody holds their lock any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if (folder / LOCK).exists():
            with suppress(Timeout, OSError), FileLock(folder / LOCK, timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
