"""Functions that a model keeps, and what they hold: `copy.deepcopy` leaves a function as it is.

A hook, or a `forward` that was put in the place of a module's own, may hold on to modules and parameters: it has closed
over them, or has them as defaults. In a copy of the model it would go on to use those of the original.
"""

from collections.abc import Iterable, Mapping
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


def _bound(thing: Any, copies: Mapping[int, Any], known: dict[int, Any]) -> Any:  # noqa: ANN401  whatever is held
    """Return a function that uses copies; the very thing, where it uses nothing that was copied."""
    if id(thing) in copies:
        return copies[id(thing)]
    if id(thing) in known:
        return known[id(thing)]
    if isinstance(thing, list | tuple) and type(thing) in (list, tuple):
        found = [_bound(t, copies, known) for t in thing]
        return thing if _are(found, thing) else type(thing)(found)
    if isinstance(thing, MethodType) and id(thing.__self__) in copies:
        return MethodType(thing.__func__, copies[id(thing.__self__)])
    if not isinstance(thing, FunctionType) or not (thing.__closure__ or thing.__defaults__ or thing.__kwdefaults__):
        return thing
    known[id(thing)] = thing  # it may close over itself
    cells = tuple(_bound_cell(cell, copies, known) for cell in thing.__closure__ or ())
    defaults = _bound(thing.__defaults__, copies, known)
    named = {name: _bound(value, copies, known) for name, value in (thing.__kwdefaults__ or {}).items()}
    same = _are(cells, thing.__closure__ or ()) and _are(named.values(), (thing.__kwdefaults__ or {}).values())
    if same and defaults is thing.__defaults__:
        return thing
    new = FunctionType(thing.__code__, thing.__globals__, thing.__name__, defaults, cells or None)
    known[id(thing)] = new
    new.__kwdefaults__ = named or None
    vars(new).update(vars(thing))
    return new


def _bound_cell(cell: CellType, copies: Mapping[int, Any], known: dict[int, Any]) -> CellType:
    try:
        held = cell.cell_contents
    except ValueError:  # nothing yet
        return cell
    bound = _bound(held, copies, known)
    return cell if bound is held else CellType(bound)


def _are(found: Iterable[object], given: Iterable[object]) -> bool:
    return all(a is b for a, b in zip(found, given, strict=True))
