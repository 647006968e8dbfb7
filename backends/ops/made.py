"""Tensors that are made of parameters alone: 1 + w, a part of w, w standardised, a frozen weight + BA.

Rules hold for them, as for parameters. What they are made of, autograd's graph says; since it does not know of data,
ops on the way are watched too (`Clean`).
"""

import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from backends.ops.answers import DATA
from backends.ops.persample import Dense, PerSample, fresh
from backends.ops.several import Sum
from backends.shortage import lack_of_memory


class Made(NamedTuple):
    """Such a tensor.

    Attributes:
        tensor: It, as autograd knows it.
        of: The parameters it is made of, by name.
    """

    tensor: Tensor
    of: Mapping[str, Tensor]


DRAWS = re.compile(
    r"dropout|rand|bernoulli|multinomial|poisson|^normal$|(normal|uniform|exponential|cauchy|geometric)_$"
)
"""Names of ops that draw: each sample's own numbers, where they are run alone."""


class Clean:
    """Tensors with nothing of samples in them, nor anything drawn: a model's own, and what ops make of these alone.

    What is changed by a way that is not watched (`.data`, a function of one's own) is not known to be clean.

    Args:
        model: Its parameters, buffers and other attributes are its own.
    """

    def __init__(self, model: nn.Module) -> None:
        own = [t for module in model.modules() for t in tree_leaves(vars(module)) if isinstance(t, Tensor)]
        self._known = {id(t): (t, t._version) for t in own}

    def __contains__(self, t: Tensor) -> bool:
        known = self._known.get(id(t))
        return known is not None and known[1] == t._version

    def made(self, func: Callable[..., Any], args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Run an op; what it makes, or changes, is clean where all that goes in is."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = getattr(func, "__name__", "")
        data = func in DATA
        clean = not (data or DRAWS.search(name)) and all(t in self for t in tensors)
        result = run()
        found = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for t in [*found, *(tensors if data or clean else [])]:
            if clean:
                self._known[id(t)] = t, t._version
            else:
                self._known.pop(id(t), None)
        return result


MOST = 10_000
"""Nodes of a graph that are looked at: a weight has fewer, and what samples have is known by the first few."""


def made_of(t: Tensor, names: Mapping[int, str], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters that a tensor is made of, by name; none where it is made of anything else with a gradient.

    Args:
        t: The tensor.
        names: The parameters' names, by identity.
        values: What they are like; what stands for one, but is there for each sample, is like none.
    """
    found: dict[str, Tensor] = {}
    nodes, known = deque([t.grad_fn]), set[object]()
    while nodes:
        node = nodes.popleft()
        if node is None or node in known:
            continue
        known.add(node)
        if len(known) > MOST:
            return {}
        if (leaf := getattr(node, "variable", None)) is not None:
            name = names.get(id(leaf))
            if name is None or leaf.shape != values[name].shape:
                return {}
            found[name] = leaf
        nodes.extend(earlier for earlier, _ in node.next_functions)
    return found


@dataclass
class Through(PerSample):
    """Gradients of a parameter by a tensor that is made of it: those of that tensor, taken back by autograd.

    Attributes:
        later: Those of the tensor.
        made: The tensor.
        parameter: The parameter.
    """

    later: PerSample
    made: Tensor
    parameter: Tensor

    def __post_init__(self) -> None:
        self.samples, self.shape, self.like = self.later.samples, tuple(self.parameter.shape), self.parameter.detach()

    def held(self) -> int:  # noqa: D102
        return self.later.held() or self.later.bytes()

    def rows(self, some: slice) -> Tensor:  # noqa: D102
        g = self.later.rows(some).to(self.made.dtype, copy=isinstance(self.later, Dense))  # a view goes back as it is
        back = partial(torch.autograd.grad, self.made, self.parameter, retain_graph=True)
        try:
            (found,) = back(g, is_grads_batched=True)
        except RuntimeError as error:
            if lack_of_memory(error):
                raise
            found = torch.stack([back(one)[0] for one in g])  # vmap cannot run some op
        return found


def settled(name: str, g: PerSample) -> PerSample:
    """Return gradients that ask no graph any more: another pass might change what it has kept."""
    terms = g.terms if isinstance(g, Sum) else [g]
    return Dense(g.grads(fresh)) if any(isinstance(term, Through) for term in terms) else g
