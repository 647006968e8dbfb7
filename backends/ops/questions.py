"""Whether a pass asks for values: its control flow may then depend on them, and what it does on what they are.

What a batch answers is not what each of its samples would. Under vmap, torch answers only where nothing belongs to a
sample, and raises everywhere else. What orders samples by values, vmap does to each of them alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READ_AT_ONCE = {Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr}
"""What hands values out without an op that a `TorchDispatchMode` sees."""

SPLITS = {torch.tensor_split, Tensor.tensor_split}
"""What reads a tensor of indices in the same way."""

ASKING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Of ops that return a value, or as many numbers as there are of something."""

INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
"""Ops that take as many as a mask says, where an index is a mask."""


SORTS = {torch.ops.aten.sort.default, torch.ops.aten.sort.stable, torch.ops.aten.topk.default}
"""Ops that put what is along an axis in an order that values give."""

PLACES = {
    torch.ops.aten.masked_scatter.default,
    torch.ops.aten.masked_scatter_.default,
    torch.ops.aten._pack_padded_sequence.default,
}
"""Ops that put what belongs to a sample where values of those before it say."""


_HEARD: ContextVar[bool] = ContextVar("_HEARD", default=True)


@contextmanager
def unheard() -> Iterator[None]:
    """Ask for values in the block on behalf of a pass that answers for each sample; see `answers.py`."""
    before = _HEARD.set(False)
    try:
        yield
    finally:
        _HEARD.reset(before)


def _orders(op: Any, args: Any, kwargs: Any) -> bool:  # noqa: ANN401  as `__torch_dispatch__` is given them
    if op not in SORTS:
        return op in PLACES
    names = [a.name for a in op._schema.arguments]
    axis = {"dim": -1, **dict(zip(names, args, strict=False)), **kwargs}["dim"]
    return args[0].dim() > 0 and len(args[0]) > 1 and axis % args[0].dim() == 0


def _asks(op: Any, args: Any) -> bool:  # noqa: ANN401  as `__torch_dispatch__` is given them
    if op in INDEXING:
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return bool(ASKING & set(getattr(op, "tags", ())))


def _others(args: Any, kwargs: Any) -> list[Any]:  # noqa: ANN401  as `__torch_function__` is given them
    return [*args[1:], *(kwargs or {}).values()]


class Questions:
    """A context.

    `asked` tells whether values of a tensor have been asked for in it: by `if x`, `x.item()`, …; `ordered`, whether
    what is on a first axis has been put in an order by values.
    """

    asked = False
    ordered = False

    def __enter__(self) -> "Questions":
        self._modes = (_Ops(self), _Reads(self))
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Ops(TorchDispatchMode):
    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self.questions = questions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if _asks(func, args) and _HEARD.get():
            self.questions.asked = True
        if _orders(func, args, kwargs or {}):
            self.questions.ordered = True
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self.questions = questions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        reads = func in READ_AT_ONCE or (func in SPLITS and any(isinstance(a, Tensor) for a in _others(args, kwargs)))
        if reads and _HEARD.get():
            self.questions.asked = True
        return func(*args, **(kwargs or {}))
