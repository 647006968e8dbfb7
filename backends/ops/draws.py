"""What is known of a model that draws random numbers: it has no repeatable gradient but under a seed."""

import pickle
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from backends.base import Named
from backends.batch import size
from backends.ops.few import Sample, alone, copied, row
from backends.ops.near import near
from backends.ops.recurrent import KINDS
from backends.ops.rules import OVER_THE_BATCH
from backends.running import kept_buffers, seeded
from backends.shortage import lack_of_memory

if TYPE_CHECKING:
    from backends.ops.passes import Passes, Way

Draws: TypeAlias = Literal["nothing", "dropout", "otherwise"]
"""What a model draws. Dropout keeps samples apart, whatever it draws; by other numbers, one in a million batches may be
mixed, and numbers of other generators than torch's no seed of torch repeats."""

PLAIN = {
    *(torch.dropout, torch.dropout_, torch.feature_dropout, torch.alpha_dropout, F.dropout, F.dropout1d, F.dropout2d),
    *(F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
}
DROPOUT = PLAIN | {F.scaled_dot_product_attention}
"""Ops that draw for dropout only."""

WITHIN = {F.multi_head_attention_forward, *(kind.layer for kind in KINDS.values())}
"""Layers that are one function to a mode, and drop in its midst."""

PROBABILITY = 4  # where `dropout_p` stands among the arguments of attention


def draws(passes: "Passes", batch: Sample) -> Draws:
    """Return what a model draws for a few samples; for one, if it runs only these alone."""
    try:
        return _drawn(passes, batch)
    except Exception as error:  # whatever a model's code may raise
        if lack_of_memory(error) or len(batch[1]) == 1:
            raise
        return _drawn(passes, alone(batch, 0))


def _drawn(passes: "Passes", batch: Sample) -> Draws:
    device = batch[1].device
    python, states = _of_python(), _States(device)
    with _Drawing(device) as drawing:
        first = passes.plain(*copied(batch))
    if _of_python() != python or drawing.otherwise:
        return "otherwise"
    once, again = first, passes.plain(*copied(batch))
    if drawn := _States(device) != states:
        once, again = (truths(passes, batch, [0], "dropout")[0] for _ in range(2))
    return "otherwise" if not near(once, again) else "dropout" if drawn else "nothing"


def without_dropout() -> TorchFunctionMode:
    """Return a context in which dropout drops nothing."""
    return _WithoutDropout()


class _SeesWithin(TorchFunctionMode, ABC):
    """Takes over what layers of attention and recurrent ones call, too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func in WITHIN:
            with self:
                found = OVER_THE_BATCH[func].function(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return self.of(func, args, kwargs or {})

    @abstractmethod
    def of(self, func: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        """Return what an op returns."""


class _WithoutDropout(_SeesWithin):
    def of(self, func: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        if func in PLAIN:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args, others = args[:PROBABILITY], args[PROBABILITY + 1 :]
            named = dict(zip(("is_causal",), others, strict=True)) if others else {}
            return func(*args, **{**kwargs, **named, "dropout_p": 0.0})
        return func(*args, **kwargs)


class _Drawing(_SeesWithin):
    """Notices whether something draws by torch, but for dropout."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.otherwise = device, False

    def of(self, func: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        before = _States(self.device)
        result = func(*args, **kwargs)
        self.otherwise |= func not in DROPOUT and _States(self.device) != before
        return result


class _States:
    """The states of torch's generators."""

    def __init__(self, device: torch.device) -> None:
        on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        self.states = [torch.get_rng_state(), *on_device]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _States) and all(map(torch.equal, self.states, other.states))

    __hash__ = None  # type: ignore[assignment]


def _of_python() -> tuple[object, ...]:
    return random.getstate(), pickle.dumps(np.random.get_state())


def truths(passes: "Passes", batch: Sample, which: Sequence[int], drawn: Draws) -> list[Named]:
    """Return the gradients of some samples by plain autograd: alone, or of a model that draws, as it drew for all."""
    if drawn == "nothing":
        return [passes.plain(*copied(alone(batch, i))) for i in which]
    with seeded(passes.model, 0), kept_buffers(passes.model):
        return passes.among(*copied(batch), which)


def draws_as_without_rules(passes: "Passes", way: "Way", batch: Sample) -> bool:
    """Return whether a way finds what it does without rules, of the same random numbers."""
    without = passes.one_by_one(with_rules=False), passes.under_vmap(False, way.answers)
    found = []
    try:
        for each in (way, next(w for w in without if w.name == way.name)):
            with seeded(passes.model, 0), kept_buffers(passes.model):
                found.append(each.run(*copied(batch), lambda name, g: g))
    except Exception as error:  # whatever a model's code may raise
        if lack_of_memory(error):
            raise
        return False
    return all(near(row(found[0], i), row(found[1], i)) for i in range(size(batch[0])))
