"""Who takes the steps of a run's cells: this process, or a child for each backend."""

from abc import abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Self

from testbed.processes.child import Child, Isolation
from testbed.processes.host import Failed, Host, Setup, Steps
from testbed.processes.store import Store, TemporaryStore

HOUSE = "the problem"  # the host of what is no backend's: problem, truth, ordinary step, limit


class Hosts(AbstractContextManager["Hosts"]):
    """Hosts by the label of a cell, or `HOUSE`; to be used in a `with` statement."""

    @abstractmethod
    def __getitem__(self, label: str) -> Steps:
        """Return the host of a label; a new one where the last was discarded."""

    @abstractmethod
    def discard(self, label: str) -> None:
        """Take no more steps with this host: what has failed in it may have left anything behind."""

    @abstractmethod
    def settle(self) -> None:
        """Wait until every host only waits, so that none takes from another's time."""

    @abstractmethod
    def pids(self) -> list[int]:
        """Return the numbers of the child processes."""


class InProcess(Hosts):
    """One host for all, in this process: for debugging, and for models that live in a notebook."""

    def __init__(self, setup: Setup) -> None:
        self._host = Host(setup)

    def __getitem__(self, label: str) -> Steps:
        """Return the one host."""
        return self._host

    def discard(self, label: str) -> None:
        """Keep the one host: there is no other process to start."""

    def settle(self) -> None:
        """Wait for nothing: there are no children."""

    def pids(self) -> list[int]:
        """Return nothing: there are no children."""
        return []

    def __exit__(self, *error: object) -> None:
        """Leave nothing behind."""


class Children(Hosts):
    """A child process for each label, so that what one backend does to its process is its own; one works at a time.

    What several need (the problem, the truth) is computed by the house's child and taken from a store by the others.

    Args:
        setup: What hosts know in advance.
        isolation: What children may take.
        labels: Those that will be asked for: they are started side by side, before anything is timed.
    """

    def __init__(self, setup: Setup, isolation: Isolation, labels: Iterable[str]) -> None:
        self._setup, self._isolation, self._labels = setup, isolation, list(dict.fromkeys(labels))
        self._children: dict[str, Child] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        folder = self._stack.enter_context(TemporaryStore()).folder
        self._setup = replace(self._setup, store=Store(folder))
        self._stack.callback(self._close)
        with self._stack.pop_all() as stack:  # a Ctrl-C meanwhile ends those that have begun
            for label in (HOUSE, *self._labels):
                self[label]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __getitem__(self, label: str) -> Steps:
        """Return the child of a label; a new one where the last was discarded."""
        if label not in self._children:
            self._children[label] = Child(self._setup, self._isolation)
        return self._children[label]

    def discard(self, label: str) -> None:
        """End the child of a label."""
        if label in self._children:
            self._children.pop(label).close()

    def settle(self) -> None:
        """Wait until every child has imported what it needs; one that cannot is tried again when it is asked."""
        for label, child in list(self._children.items()):
            try:
                child.settle()
            except Failed:
                self.discard(label)

    def pids(self) -> list[int]:
        """Return the numbers of the child processes."""
        return [child.pid for child in self._children.values()]

    def _close(self) -> None:
        for child in self._children.values():
            child.kill()  # all at once; closing waits for each
        for label in list(self._children):
            self.discard(label)
