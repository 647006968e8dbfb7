"""Where two forward passes of a model part: the module that first makes something else of the same."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from backends.base import describe

Seen = list[tuple[str, Tensor]]
"""Numbers in the order they were made, each with the module whose code made it."""


def first_difference(
    model: nn.Module, run: Callable[[], object], other: Callable[[], object], differs: Callable[[Tensor, Tensor], bool]
) -> str | None:
    """Run a model in two ways and return the module in whose own code they part; None if no module shows it.

    What a module is given was made by the code of the module that calls it, so a function between two modules is
    that of the one around them. The model keeps the hooks.
    """
    trace = _Trace(model)
    run()
    before = trace.take()
    other()
    pairs = zip(before, trace.take(), strict=False)
    return next((name for (name, a), (_, b) in pairs if differs(a, b)), None)


class _Trace:
    """Keeps what each module was given and what it returned."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: Seen = []
        self._running = [describe("", model)]
        for path, module in model.named_modules():
            name = describe(path, module)
            module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            module.register_forward_hook(self._after)

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep((args, kwargs))
            self._running.append(name)

        return hook

    def _after(self, module: nn.Module, args: object, output: object) -> None:
        self._keep(output)
        self._running.pop()

    def _keep(self, values: object) -> None:
        found = [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]
        self._seen += [(self._running[-1], t.detach().clone()) for t in found]

    def take(self) -> Seen:
        found, self._seen = self._seen, []
        return found
