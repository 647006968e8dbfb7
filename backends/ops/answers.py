"""What a pass answers when it is asked whether something holds for all, or for any, of its samples.

`if mask.all():` is how models leave out what they need not compute, such as a mask that masks nothing. Of such a
question it is known what each sample would answer alone. A sample that would answer as the batch does goes the way that
it goes alone; that the batch's way is right for the others too is looked at, for each kind of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backends.ops.choice import capturing
from backends.ops.questions import unheard

ALL = {torch.all, Tensor.all}
ANY = {torch.any, Tensor.any}
SUM = {torch.sum, Tensor.sum}
EQUAL = {torch.eq, Tensor.eq, Tensor.__eq__}
TWO = EQUAL | {Tensor.__contains__}
READ = {Tensor.__bool__, Tensor.item}
ANSWERED = ALL | ANY | SUM | TWO | READ
"""Ops that ask, and what is read of the answer: also `value in t`, and `mask.sum() == mask.numel()`."""


class Answers(NamedTuple):
    """A batch's answers.

    Attributes:
        values: In the order of the questions.
        kinds: What its samples would answer alone.
    """

    values: tuple[bool, ...] = ()
    kinds: frozenset[tuple[bool, ...]] = frozenset()

    def are_as(self, expected: "Answers") -> bool:
        """Return whether a batch went the way of another one, which had all kinds of its samples."""
        return self.values == expected.values and self.kinds <= expected.kinds


NONE = Answers()


class Question(NamedTuple):
    """A question, and what each sample would answer alone."""

    own: Sequence[bool]
    every: bool

    @property
    def value(self) -> bool:
        """The batch's answer."""
        return all(self.own) if self.every else any(self.own)


class OtherAnswers(Exception):
    """A pass is asked something else, or answers otherwise, than the pass that was looked at."""


class _Asked(ABC):
    """What passes have in common: results of `all` and `any` are known again when their values are read."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Tensor, Tensor, bool]] = {}
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401  as `__torch_function__` is given them
        """Return what one of `ANSWERED` returns."""
        if kwargs or not isinstance(args[0], Tensor) or len(args) != 1 + (func in TWO):
            return func(*args, **(kwargs or {}))
        t, *value = args
        if func in READ:
            return self.read(*self._open[id(t)]) if id(t) in self._open else func(t)
        if func is Tensor.__contains__:
            return self(Tensor.__bool__, (self(Tensor.any, (t == value[0],), {}),), {})
        if func in EQUAL:
            return self._compared(func, t, value[0])
        if func in SUM:
            result = func(t)
            if t.dtype == torch.bool:
                self._sums[id(result)] = result, t  # kept, so that no other tensor gets its id
            return result
        result, own = self.reduced(func, t)
        if own is not None:
            self._open[id(result)] = result, own, func in ALL
        return result

    def _compared(self, func: Any, t: Tensor, value: Any) -> Any:  # noqa: ANN401
        """Return whether something equals a value; a sum of truth values may be as large as it can be, or nothing."""
        if id(t) in self._sums and isinstance(value, int):
            counted = self._sums[id(t)][1]
            if value in (0, counted.numel()):
                return self(Tensor.all, (counted if value else ~counted,), {})
        return func(t, value)

    @abstractmethod
    def reduced(self, func: Any, t: Tensor) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401  one of `ALL` and `ANY`
        """Return what it returns, and of each sample alone, if that is known."""

    @abstractmethod
    def read(self, result: Tensor, own: Tensor, every: bool) -> bool:
        """Return the answer."""


class Asked(_Asked):
    """What a pass over a batch is asked.

    Args:
        samples: N.
        expected: The answers of the pass that was looked at; None where they are to be found.
    """

    def __init__(self, samples: int, expected: Answers | None = None) -> None:
        super().__init__()
        self.samples, self.expected = samples, expected
        self.questions: list[Question] = []

    @property
    def own(self) -> list[tuple[bool, ...]]:
        """What each sample would answer alone; nothing if nothing is asked."""
        return list(zip(*(q.own for q in self.questions), strict=True))

    @property
    def answers(self) -> Answers:
        """What has been answered."""
        return Answers(tuple(q.value for q in self.questions), frozenset(self.own))

    def reduced(self, func: Any, t: Tensor) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401, D102
        if t.dim() == 0 or len(t) != self.samples or t.dtype == torch.uint8:
            return func(t), None
        rows = t.reshape(self.samples, t.numel() // self.samples)
        own = rows.all(1) if func in ALL else rows.any(1)
        return own.all() if func in ALL else own.any(), own

    def read(self, result: Tensor, own: Tensor, every: bool) -> bool:
        """Return the answer.

        Raises:
            OtherAnswers: It is not as expected.
        """
        if capturing(own):
            raise RuntimeError("what is recorded has no answers")
        with unheard():
            question = Question(own.tolist(), every)
        count = len(self.questions)
        self.questions.append(question)
        if self.expected and self.expected.values[count : count + 1] != (question.value,):
            raise OtherAnswers
        return question.value

    def end(self) -> None:
        """Say that the pass has been asked all.

        Raises:
            OtherAnswers: It has not gone the expected way, or samples of a kind that was not there.
        """
        if self.expected and not self.answers.are_as(self.expected):
            raise OtherAnswers


class Told(_Asked):
    """The answers of a pass under vmap, where no sample knows of others: the batch's, as they should be.

    Args:
        expected: These.
        counted: Whether those are among them that vmap gives itself, since they are the same for all samples.
    """

    def __init__(self, expected: Answers, counted: bool = False) -> None:
        super().__init__()
        self.expected, self.counted = expected, counted
        self.own: list[Tensor] = []
        self.every: list[bool] = []

    def anew(self) -> "Told":
        """Return the same for another pass."""
        return Told(self.expected, self.counted)

    def reduced(self, func: Any, t: Tensor) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401, D102
        result = func(t)
        return result, result

    def read(self, result: Tensor, own: Tensor, every: bool) -> bool:  # noqa: D102
        try:
            given = bool(result)
        except RuntimeError:  # it belongs to a sample
            if len(self.own) == len(self.expected.values):
                raise
        else:
            if not self.counted:
                return given
            if len(self.own) == len(self.expected.values):
                raise OtherAnswers
            own = torch.tensor(given)
        self.own.append(own)
        self.every.append(every)
        return self.expected.values[len(self.own) - 1]

    def check(self, own: Sequence[Tensor]) -> None:
        """Say what each sample would have answered [N], question by question; vmap is over.

        Raises:
            OtherAnswers: That does not make the answers that were told.
        """
        asked = Asked(0)
        asked.questions = [Question(t.tolist(), every) for t, every in zip(own, self.every, strict=True)]
        if own and not asked.answers.are_as(self.expected):
            raise OtherAnswers
