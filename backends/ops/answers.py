"""What a pass answers when it is asked whether something holds for all, or for any, of its samples.

`if mask.all():` is how models leave out what they need not compute, such as a mask that masks nothing. A batch whose
samples would all answer the same goes the way that each of them goes alone; another one is run in groups that do
(`ways.py`). What a sample would answer is known of what is made of its own inputs, entry by entry; nothing else is
answered here.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from backends.ops.choice import capturing
from backends.ops.questions import unheard

ALL = {torch.all, Tensor.all}
ANY = {torch.any, Tensor.any}
SUM = {torch.sum, Tensor.sum}
EQUAL = {torch.eq, Tensor.eq, Tensor.__eq__}
READ = {Tensor.__bool__, Tensor.item}
BY_ENTRY = EQUAL | {
    *(torch.ne, torch.lt, torch.le, torch.gt, torch.ge, torch.logical_not, torch.logical_and, torch.logical_or),
    *(Tensor.ne, Tensor.lt, Tensor.le, Tensor.gt, Tensor.ge, Tensor.logical_not, Tensor.logical_and, Tensor.logical_or),
    *(Tensor.__ne__, Tensor.__invert__, Tensor.__and__, Tensor.__or__, Tensor.bitwise_not, Tensor.bitwise_and),
    *(torch.isnan, torch.isinf, torch.isfinite, Tensor.isnan, Tensor.isinf, Tensor.isfinite, torch.abs, Tensor.abs),
    *(Tensor.to, Tensor.type, Tensor.bool, Tensor.int, Tensor.long, Tensor.float, Tensor.double, Tensor.clone),
}
"""Ops that make each entry of their result of one entry."""

SHAPED = {
    *(torch.reshape, torch.flatten, torch.unsqueeze, torch.squeeze, Tensor.reshape, Tensor.view, Tensor.flatten),
    *(Tensor.unsqueeze, Tensor.squeeze, Tensor.contiguous),
}
"""Ops that leave entries in their order: those of a sample stay together where there are as many rows as before."""

CAT = {torch.cat, torch.concat, torch.concatenate}
FILLED = {torch.ones, torch.zeros}
"""Ops that make the same numbers for every sample."""

DATA = {Tensor.data.__get__, Tensor.data.__set__}  # type: ignore[attr-defined]
"""What changes a tensor without its version."""

HEARD = ALL | ANY | SUM | READ | BY_ENTRY | SHAPED | CAT | FILLED | DATA | {Tensor.__contains__, Tensor.__getitem__}
"""Ops that ask, as `if mask.all()`, `value in tokens` and `mask.sum() == mask.numel()` do, and what leads there."""


class OtherAnswers(Exception):
    """A pass is asked something else, or answers otherwise, than the pass that was looked at.

    Attributes:
        own: What each sample would answer, where they are not of one mind.
        given: Else what all of them have answered so far.
    """

    def __init__(self, own: Sequence[bool] | None = None, given: tuple[bool, ...] = ()) -> None:
        super().__init__()
        self.own, self.given = own, given


class _Asked(ABC):
    """What is asked in a pass.

    Args:
        inputs: What each sample has of its own: tensors [N, ...].
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        inputs = list(inputs)
        self.samples = len(inputs[0])
        self._own: dict[int, tuple[Tensor, int]] = {}  # what is made of these, and its version: kept, as its id is
        self._sums: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._open: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._unread: dict[int, tuple[Tensor, Tensor]] = {}
        for t in inputs:
            self._own[id(t)] = t, t._version

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401  as `__torch_function__` is given them
        """Return what one of `HEARD` returns."""
        kwargs = kwargs or {}
        t: Any = args[0] if args else None
        alone = len(args) == 1 and not kwargs
        if func in DATA:
            for known in (self._own, self._sums, self._open):
                known.clear()
        if func in READ and alone:
            self._unread.pop(id(t), None)
            result, version, own = self._open.get(id(t), (None, 0, None))
            return self.answer(own) if own is not None and t._version == version else func(t)
        if func is Tensor.__contains__ and self._is_own(t):
            return self(Tensor.__bool__, (self(Tensor.any, (self(Tensor.__eq__, args, {}),), {}),), {})
        if func in EQUAL and id(t) in self._sums and not kwargs:
            return self._compared(func, t, args[1])
        result = func(*args, **kwargs)
        if func in SUM and alone and t.dtype == torch.bool and self._is_own(t):
            self._sums[id(result)] = result, result._version, t.clone()
        elif (func in ALL or func in ANY) and alone:
            self._reduced(t, result, every=func in ALL)
        elif isinstance(result, Tensor) and self._is_made_of_own(func, args, kwargs, result):
            self._own[id(result)] = result, result._version
        return result

    @abstractmethod
    def of_each(self, t: Tensor, result: Tensor, *, every: bool) -> Tensor:
        """Return what each sample would have as the result of `all`, or `any`, over t."""

    @abstractmethod
    def answer(self, own: Tensor) -> bool:
        """Return the answer to a question, of which each sample's own is known."""

    def _is_own(self, t: Any) -> bool:  # noqa: ANN401
        known = self._own.get(id(t))
        return known is not None and known[0]._version == known[1]

    def _is_made_of_own(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> bool:  # noqa: ANN401
        if func in FILLED:
            return result.dim() > 0 and len(result) == self.samples
        if func in CAT:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return len(args) > 0 and all(map(self._is_own, args[0])) and axis % result.dim() > 0
        t, *others = args
        if not self._is_own(t):
            return False
        if func in SHAPED:
            return result.dim() > 0 and len(result) == len(t) and result.numel() == t.numel()
        if func is Tensor.__getitem__:  # of all samples the same
            first, *rest = others[0] if isinstance(others[0], tuple) else (None,)
            plain = [i for i in rest if i is None or isinstance(i, int | slice)]
            lists = len(plain) == len(rest) or (len(rest) == 1 and isinstance(rest[0], list))  # of several, axes move
            return isinstance(first, slice) and first == slice(None) and lists
        tensors = [o for o in (*others, *kwargs.values()) if isinstance(o, Tensor)]
        return func in BY_ENTRY and all(self._is_own(o) and o.shape == t.shape for o in tensors)

    def _reduced(self, t: Tensor, result: Tensor, *, every: bool) -> None:
        self._unread[id(result)] = t, result
        if self._is_own(t) and result.dtype == torch.bool:
            self._open[id(result)] = result, result._version, self.of_each(t, result, every=every)

    def _compared(self, func: Any, t: Tensor, value: Any) -> Any:  # noqa: ANN401
        """Return whether a sum equals a value; of truth values, it may be as large as it can be, or nothing."""
        _, version, counted = self._sums[id(t)]
        result = func(t, value)
        if t._version == version and isinstance(value, int) and value in (0, counted.numel()):
            result = result.clone()  # a tensor of its own
            own = self.of_each(counted if value else ~counted, result, every=True)
            self._open[id(result)] = result, result._version, own
        return result


class Asked(_Asked):
    """What a pass over a batch is asked.

    Args:
        inputs: What each sample has of its own: tensors [N, ...].
        expected: The answers of the pass that was looked at; None where they are to be found.
    """

    def __init__(self, inputs: Iterable[Tensor], expected: tuple[bool, ...] | None = None) -> None:
        super().__init__(inputs)
        self.expected = expected
        self.given: tuple[bool, ...] = ()

    def of_each(self, t: Tensor, result: Tensor, *, every: bool) -> Tensor:  # noqa: D102
        rows = t.reshape(len(t), t.numel() // max(1, len(t)))
        return rows.all(1) if every else rows.any(1)

    def answer(self, own: Tensor) -> bool:
        """Return the answer.

        Raises:
            OtherAnswers: It is not as expected, or samples are not of one mind.
        """
        if capturing(own):
            raise RuntimeError("what is recorded has no answers")
        with unheard():
            each: list[bool] = own.tolist()
        if len(each) != self.samples:
            raise RuntimeError("it is not of the samples that this is asked")
        if len(set(each)) > 1:
            raise OtherAnswers(each)
        self.given += (each[0],)
        if self.expected is not None and self.expected[: len(self.given)] != self.given:
            raise OtherAnswers(given=self.given)
        return each[0]

    def end(self) -> None:
        """Say that the pass has been asked all.

        Raises:
            OtherAnswers: That is less than expected.
            RuntimeError: What holds for all samples, or for any, is used as a number.
        """
        if any(t.dim() > 0 and len(t) == self.samples for t, _ in self._unread.values()):
            raise RuntimeError("samples depend on what holds for others")
        if self.expected is not None and self.expected != self.given:
            raise OtherAnswers


class Told(_Asked):
    """The answers of a pass under vmap, where no sample knows of others: what all of them should answer.

    Args:
        inputs: What a sample has of its own.
        expected: The answers.
    """

    def __init__(self, inputs: Iterable[Tensor], expected: tuple[bool, ...]) -> None:
        super().__init__(inputs)
        self.expected = expected
        self.own: list[Tensor] = []

    def of_each(self, t: Tensor, result: Tensor, *, every: bool) -> Tensor:  # noqa: D102
        return result

    def answer(self, own: Tensor) -> bool:
        """Return the answer.

        Raises:
            RuntimeError: None is known.
        """
        if len(self.own) == len(self.expected):
            raise RuntimeError("there is no answer to this")
        self.own.append(own)
        return self.expected[len(self.own) - 1]

    def check(self, own: Sequence[Tensor]) -> None:
        """Say what each sample would have answered [N], question by question; vmap is over.

        Raises:
            OtherAnswers: That is not what they were told.
        """
        for t, told in zip(own, self.expected, strict=False):
            each: list[bool] = t.tolist()
            if any(answer != told for answer in each):
                raise OtherAnswers(each if len(set(each)) > 1 else None)
        if len(own) != len(self.expected):
            raise OtherAnswers
