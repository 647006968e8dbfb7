"""Registries of functions that are written by users: what cannot be called later is refused when it is registered."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from backends.registry import Registry

T = TypeVar("T", bound=Callable[..., Any])


class CannotRegister(TypeError):
    """A function that is written or registered wrongly: one line that says what is wrong and how it should be."""


class Factories(Registry[T]):
    """A registry of functions that are called with positional arguments, and with their options by name.

    Args:
        kind: What they make, "model", say.
        given: The names of the positional arguments.
    """

    def __init__(self, kind: str, *given: str) -> None:
        super().__init__(kind)
        self._given = given

    def register(self, name: str) -> Callable[[T], T]:
        """Return the decorator that registers what it decorates.

        Raises:
            CannotRegister: It was written without a name.
        """
        if callable(name):
            decorator, found = f"@register_{self.kind}", getattr(name, "__name__", "name")
            raise CannotRegister(f'{decorator} needs a name in brackets: {decorator}("{found}")')
        return super().register(name)

    def add(self, name: str, thing: T) -> T:
        """Register `thing`.

        Raises:
            CannotRegister: It cannot be called with what it is given, or an option has no type.
        """
        signature = inspect.signature(thing)
        try:
            signature.bind_partial(*self._given)
        except TypeError:
            takes = f"{getattr(thing, '__name__', name)}{signature}"
            raise CannotRegister(f"{self.kind} '{name}' is given ({', '.join(self._given)}), found {takes}") from None
        by_place = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        for p in by_place[len(self._given) :]:
            if p.default is p.empty:
                shown = f"({', '.join(self._given)}, *, {p.name}: TYPE)"
                raise CannotRegister(f"'{p.name}' of {self.kind} '{name}': options are keyword-only; write {shown}")
        for option in (p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY):
            if option.annotation is option.empty:
                raise CannotRegister(f"option '{option.name}' of {self.kind} '{name}' needs a type")
        return super().add(name, thing)
