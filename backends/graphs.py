"""CUDA graphs: a call is recorded once for each form of input and then replayed, which costs the host one launch.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. Small models are launch-bound: there it pays.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from backends.batch import Batch, apply, detached, form, tensors
from backends.refusals import Unsupported, first_line_of

WARM_UPS = (
    3  # calls before recording, on a stream of their own: libraries choose kernels and allocate in the first ones
)

_RECORDING: ContextVar[bool] = ContextVar("recording", default=False)

_AHEAD = False  # no ContextVar: on CUDA, autograd runs the backward pass in a thread of its own


def ahead() -> bool:
    """Return whether what runs now is recorded, or will be: then only the device's time counts, not the host's."""
    return _AHEAD


def recording() -> bool:
    """Return whether a call is being recorded: what asks the host or the random state must then stay out of it."""
    return _RECORDING.get()


def graphed(fn: Callable[[Batch, Tensor], Any], *, kept: bool = True) -> Callable[[Batch, Tensor], Any]:
    """Return a function whose calls are replayed from graphs.

    Args:
        fn: The function.
        kept: Whether its results stay valid after the next call, as copies; else they are the graph's own memory.
    """
    graphs: dict[object, _Graph] = {}

    def run(inputs: Batch, targets: Tensor) -> Any:  # noqa: ANN401  as the function
        # else each call would add to the history of what it is copied to
        inputs, targets = detached(inputs), detached(targets)
        if (this := form(inputs, targets)) not in graphs:
            with torch.cuda.device_of(targets), _is_ahead():  # what is recorded is the current device's
                graphs[this] = _record(fn, inputs, targets)
        result = graphs[this].replay(inputs, targets)
        return tree_map(torch.clone if kept else torch.Tensor.detach, result)  # dicts are the caller's in any case

    return run


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: Batch
    targets: Tensor
    result: Any

    def replay(self, inputs: Batch, targets: Tensor) -> Any:  # noqa: ANN401  as the recorded function
        with torch.cuda.device_of(self.targets):
            for static, t in zip([*tensors(self.inputs), self.targets], [*tensors(inputs), targets], strict=True):
                static.copy_(t)
            self.graph.replay()
        return self.result


def _record(fn: Callable[[Batch, Tensor], Any], inputs: Batch, targets: Tensor) -> _Graph:
    inputs, targets = apply(torch.clone, inputs), targets.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            fn(inputs, targets)
    torch.cuda.current_stream().wait_stream(side)
    graph, failure = torch.cuda.CUDAGraph(), None
    try:
        with _same_stream_afterwards(), _recorded(), torch.cuda.graph(graph):
            try:
                result = fn(inputs, targets)
            except (RuntimeError, Unsupported) as error:
                failure = error  # to end the recording fails too, and says less
                raise
    except (RuntimeError, Unsupported) as error:
        failure = failure or error
        why = first_line_of(str(failure))
        raise Unsupported(f"`model` (cuda_graph=True): the call cannot be recorded as a CUDA graph: {why}") from failure
    return _Graph(graph, inputs, targets, result)


def _same_stream_afterwards() -> AbstractContextManager[object]:
    """Return a context after which the current stream is what it was: a recording that fails does not see to it."""
    return torch.cuda.stream(torch.cuda.current_stream())


@contextmanager
def _is_ahead() -> Iterator[None]:
    global _AHEAD
    before, _AHEAD = _AHEAD, True
    try:
        yield
    finally:
        _AHEAD = before


@contextmanager
def _recorded() -> Iterator[None]:
    token = _RECORDING.set(True)
    try:
        yield
    finally:
        _RECORDING.reset(token)
