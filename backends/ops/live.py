"""How much memory the tensors of a call take at most, on any device: neither glibc nor the kernel would say."""

import weakref
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backends.shortage import enough_for


class Live(TorchDispatchMode):
    """A context; `peak` is how many bytes the tensors that ops returned in it have taken at a time.

    What an op needs while it runs, and returns to nobody, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        given = {memory.data_ptr() for memory in _memories((args, kwargs))}
        for memory in _memories(result):
            if memory.data_ptr() not in given:  # no view
                self._take(memory)
        return result

    def _take(self, memory: torch.UntypedStorage) -> None:
        size, place = memory.nbytes(), memory.data_ptr()
        if place in self._known:
            return
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(memory, self._free, place, size)

    def _free(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def _memories(tree: object) -> list[torch.UntypedStorage]:
    found = []
    for t in tree_leaves(tree):
        if isinstance(t, Tensor):
            with suppress(RuntimeError):  # sparse tensors, and the zeros of forward mode, have none
                t.untyped_storage().data_ptr()
                found.append(t.untyped_storage())
    return found


def peak(call: Callable[[], object]) -> float:
    """Return how many bytes a call's tensors take at most; endless where it needs more than there is."""
    live = Live()

    def watched() -> None:
        with live:
            call()

    return live.peak if enough_for(watched) else inf
