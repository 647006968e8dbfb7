"""Both passes and what is made of their pairs as one graph of aten ops, which `torch.compile` makes faster.

The compiler cannot follow what taps keep in Python; `make_fx` need not: it records the ops that run, those of the
backward pass and of the contractions too (https://docs.pytorch.org/docs/stable/fx.html), of tensors without values, so
that whatever asks for one is refused. Shapes and choices are those of the recorded call; parameters and buffers are
looked at anew in each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from backends.base import Unsupported
from backends.batch import Batch, form, size
from backends.execution import compiled
from backends.ops.choice import tracing
from backends.ops.passes import ONE_BY_ONE, Way
from backends.ops.ways import Ways
from backends.running import first_sentence, kept_buffers

R = TypeVar("R")


@dataclass
class Compiled(Generic[R]):
    """A function of (inputs, targets), compiled for each form of them.

    Attributes:
        passes: How the passes are run.
        made: (the way to run both passes, inputs, targets) -> the result.
        graphs: The compiled ones, by form.
    """

    passes: Ways
    made: Callable[[Way, Batch, Tensor], R]
    graphs: dict[object, Callable[[Batch, Tensor], R]] = field(default_factory=dict)

    def __call__(self, inputs: Batch, targets: Tensor) -> R:
        """Return the result.

        Raises:
            Unsupported: The passes are run one sample at a time, or the compiler fails.
        """
        this = form(inputs, targets)
        with kept_buffers(self.passes.of.model):
            if this not in self.graphs:
                self.graphs[this] = self._compiled(inputs, targets)
            with torch.no_grad(), torch.autocast(targets.device.type, enabled=False):  # the graph has the casts
                return self.graphs[this](inputs, targets)

    def _compiled(self, inputs: Batch, targets: Tensor) -> Callable[[Batch, Tensor], R]:
        way = self.passes.way(inputs, targets)
        if way.name == ONE_BY_ONE and size(inputs) > 1:
            raise Unsupported("`model` (compile=True): its samples are run one by one, which is no single graph")
        if way.answers:
            why = "the model asks for values, such as `mask.all()`, by which one graph cannot go different ways"
            raise Unsupported(f"`model` (compile=True): {why}")
        self.made(way, inputs, targets)  # chooses the fastest contractions
        with tracing():
            try:
                graph = make_fx(partial(self.made, way), tracing_mode="fake", _allow_non_fake_inputs=True)(
                    inputs, targets
                )
            except RuntimeError as error:
                raise Unsupported(f"`model` (compile=True): make_fx: {first_sentence(error)}") from error
        return compiled(graph)
