"""Functions that a model keeps, and what they have closed over: `copy.deepcopy` leaves a function as it is.

A hook, or a `forward` that was put in the place of a module's own, may hold on to modules and parameters. In a copy of
the model it would go on to use those of the original.
"""

from collections.abc import Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn


def bind_anew(copied: nn.Module, copies: Mapping[int, Any]) -> None:
    """Let the functions that modules keep, their hooks among them, use what the copy has in place of the original's.

    Args:
        copied: The copy.
        copies: By the identity of each thing that was copied, its copy.
    """
    for module in copied.modules():
        kept = vars(module)
        for held in [kept, *(value for value in kept.values() if isinstance(value, dict))]:
            for key, value in list(held.items()):
                if (bound := _bound(value, copies, {})) is not value:
                    held[key] = bound


def _bound(thing: Any, copies: Mapping[int, Any], known: dict[int, Any]) -> Any:  # noqa: ANN401  whatever a cell holds
    """Return a function that uses copies; the very thing, where it uses nothing that was copied."""
    if id(thing) in copies:
        return copies[id(thing)]
    if id(thing) in known:
        return known[id(thing)]
    if isinstance(thing, list | tuple) and type(thing) in (list, tuple):
        found = [_bound(t, copies, known) for t in thing]
        return thing if all(a is b for a, b in zip(found, thing, strict=True)) else type(thing)(found)
    if isinstance(thing, MethodType) and id(thing.__self__) in copies:
        return MethodType(thing.__func__, copies[id(thing.__self__)])
    if not isinstance(thing, FunctionType) or not thing.__closure__:
        return thing
    known[id(thing)] = thing  # it may close over itself
    cells = []
    for cell in thing.__closure__:
        try:
            held = cell.cell_contents
        except ValueError:  # nothing yet
            cells.append(cell)
            continue
        bound = _bound(held, copies, known)
        cells.append(cell if bound is held else CellType(bound))
    if all(a is b for a, b in zip(cells, thing.__closure__, strict=True)):
        return thing
    new = known[id(thing)] = FunctionType(
        thing.__code__, thing.__globals__, thing.__name__, thing.__defaults__, tuple(cells)
    )
    new.__kwdefaults__ = thing.__kwdefaults__
    vars(new).update(vars(thing))
    return new
