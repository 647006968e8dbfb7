"""Names to things: the one registry behind backends, models, data and losses.

A registered callable's keyword-only parameters (or, for a dataclass, its fields) are its options; they are checked
against their annotations, so that an option from YAML or Python is right or is refused with the reason.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Generic, TypeVar, get_origin, get_type_hints

from pydantic import ConfigDict, Field, ValidationError, create_model

T = TypeVar("T", bound=Callable[..., Any])


class UnknownName(LookupError):
    """A name that nothing is registered under; the message says what is, and what was probably meant."""


class BadOption(ValueError):
    """An option that does not exist, is missing or has the wrong type; `path` leads to it inside the options."""

    def __init__(self, message: str, path: tuple[str | int, ...] = ()) -> None:
        super().__init__(message)
        self.path = path


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return `" (did you mean 'vmap'?)"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Return the sentence for a name that is not known: what was asked, what is allowed."""
    names = sorted(known)
    listed = ", ".join(f"'{known}'" if "," in known else known for known in names)
    return f"unknown {kind} '{name}'{did_you_mean(name, names)}; available: {listed or 'none'}"


def options_of(thing: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the options of a registered thing: dataclass fields, or a function's keyword-only parameters.

    Raises:
        NameError: An annotation that is text names nothing. Only those of options are looked at: others may be for
            type checkers alone.
    """
    everything = dataclasses.is_dataclass(thing)
    found = {
        name: p
        for name, p in inspect.signature(thing).parameters.items()
        if everything or p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    there = getattr(thing.__init__ if inspect.isclass(thing) else inspect.unwrap(thing), "__globals__", {})
    texts = SimpleNamespace(__annotations__={name: p.annotation for name, p in found.items()})
    types = get_type_hints(texts, there, include_extras=True)
    return {name: p.replace(annotation=types[name]) for name, p in found.items()}


def check_options(kind: str, name: str, thing: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Check options against the annotations of `thing` and return them, defaults filled in.

    Raises:
        BadOption: An option is unknown, missing or of the wrong type.
    """
    known = options_of(thing)
    for key in options:
        if key not in known:
            raise BadOption(
                f"{kind} '{name}' has no option '{key}'{did_you_mean(key, known)}; {_allowed(known)}", (key,)
            )
    fields: dict[str, Any] = {
        option: (p.annotation, Field(default=... if p.default is p.empty else p.default)) for option, p in known.items()
    }
    schema = create_model(name, __config__=ConfigDict(strict=True, frozen=True, allow_inf_nan=False), **fields)
    given = {key: _as_asked(value, known[key].annotation) for key, value in options.items()}
    try:
        return {option: getattr(schema.model_validate(given), option) for option in known}
    except ValidationError as error:
        first = error.errors()[0]
        raise BadOption(f"{kind} '{name}', option {explain(first)}", tuple(first["loc"])) from None


def _as_asked(value: Any, annotation: Any) -> Any:  # noqa: ANN401  whatever an option is
    """Return a list or tuple as the one of the two that the option asks for: YAML and Python differ in them."""
    if isinstance(value, list | tuple):
        return list(value) if list in (annotation, get_origin(annotation)) else tuple(value)
    return value


def explain(error: Mapping[str, Any]) -> str:
    """Return one pydantic error as `'where': what is wanted, found what`."""
    loc = [part for part in error["loc"] if not (isinstance(part, str) and ("[" in part or part in _UNION_BRANCHES))]
    where = ".".join(str(part) for part in loc)
    if error["type"] == "missing":
        return f"'{where}' is required"
    wanted = _WANTED.get(error["type"]) or error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"'{where}': {wanted[0].lower()}{wanted[1:]}, found {_shown(error['input'])}"


_UNION_BRANCHES = {"int", "float", "str", "bool", "none"}  # pydantic adds the tried type of a union to the location
_WANTED = {  # pydantic speaks of Python's types; a user writes YAML
    "bool_type": "should be true or false",
    "dict_type": "should be a mapping, {key: value}",
    "float_type": "should be a number",
    "int_from_float": "should be a whole number",
    "int_type": "should be a whole number",
    "model_type": "should be a mapping, {key: value}",
    "string_type": "should be text",
    "too_short": "should have at least one item",
    "tuple_type": "should be a list, [a, b]",
}


def _shown(value: object) -> str:
    """Return a value as a user wrote it, cut where it is long."""
    text = "nothing" if value is None else repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def _allowed(known: Mapping[str, inspect.Parameter]) -> str:
    return f"options: {', '.join(known)}" if known else "it has none"


class Registry(Generic[T]):
    """What is registered under which name, for one kind of thing ("backend", "model", …)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise UnknownName(unknown(self.kind, name, self._entries))
        return self._entries[name]

    def add(self, name: str, thing: T) -> T:
        """Register `thing`; a second thing of the same name from another place is an error."""
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            raise ValueError(f"a {self.kind}'s name is made of letters, digits, '_' and '-', found {name!r}")
        known = self._entries.get(name)
        if known is not None and _place(known) != _place(thing):
            raise ValueError(f"two {self.kind}s are named '{name}': {_place(known)} and {_place(thing)}")
        try:
            options_of(thing)
        except NameError as error:
            raise NameError(
                f"the type of an option of {self.kind} '{name}': {error}; type checkers may do without, options may not"
            ) from None
        self._entries[name] = thing
        return thing

    def register(self, name: str) -> Callable[[T], T]:
        """Return the decorator that registers what it decorates."""
        return lambda thing: self.add(name, thing)

    def check(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options of `name`, checked and with defaults filled in."""
        return check_options(self.kind, name, self[name], options)


def _place(thing: Callable[..., Any]) -> str:
    """Return `FILE:name`, which is the same for a file loaded twice and different for two files."""
    return f"{inspect.getsourcefile(thing)}:{thing.__qualname__}"
