"""A list stands for a sweep: YAML data with lists → every combination of their items, each knowing where it stood.

A list is a sweep where a single value is wanted: `batch_size: [1, 16]`, `{vmap: {chunk_size: [4, 16]}}`. An option that
is a list itself, such as `hidden: [64, 64]`, is swept by a list of lists.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

from pydantic import PydanticUserError, TypeAdapter

from backends.registry import Registry, options_of
from testbed.config.yaml_source import ConfigError, KeyPath, Source

MAX_CELLS = 10_000  # more than that is a slip: a few lists multiply to billions

Known: TypeAlias = Registry[Any] | Mapping[str, Any]
"""A name → what is registered under it, whose options are known."""


@dataclass(frozen=True)
class Part:
    """YAML data without sweeps, and where it stands in the file.

    Attributes:
        value: The data.
        origin: Path inside `value` → path in the file; of the paths below it only those that differ.
        source: The file.
        sweep: Where in the file the item stands that makes this part differ from its neighbours.
    """

    value: Any
    origin: Mapping[KeyPath, KeyPath]
    source: Source
    sweep: KeyPath = ()

    def place(self, path: KeyPath, *, key: bool = False) -> str:
        """Return `file:line:col` of what stands at a path inside `value`; see `Source.place`."""
        length = next(n for n in range(len(path), -1, -1) if path[:n] in self.origin)
        return self.source.place((*self.origin[path[:length]], *path[length:]), key=key)


def items(value: Any, path: KeyPath, source: Source) -> list[Part]:  # noqa: ANN401  whatever the YAML holds
    """Return the items of a list, or the one value that stands there.

    Raises:
        ConfigError: The list is empty.
    """
    if not isinstance(value, list):
        return [Part(value, {(): path}, source, path)]
    if not value:
        raise ConfigError(f"{source.place(path)}: '{_dotted(path)}': should have at least one item, found []")
    return [Part(item, {(): (*path, i)}, source, (*path, i)) for i, item in enumerate(value)]


def choices(part: Part, known: Known) -> list[Part]:
    """Return `{name: {option: [a, b]}}` as `{name: {option: a}}` and `{name: {option: b}}`; all else as it is.

    Raises:
        ConfigError: A list is empty, or there are too many combinations.
    """
    if not (isinstance(part.value, dict) and len(part.value) == 1):
        return [part]
    name, options = next(iter(part.value.items()))
    if name not in known or not isinstance(options, dict):
        return [part]
    types = {option: p.annotation for option, p in options_of(known[name]).items()}
    swept = {
        option: items(value, (*part.origin[()], name, option), part.source)
        for option, value in options.items()
        if option in types and _depth(value) > _depth_of_type(types[option])
    }
    return [
        Part(
            {name: {**options, **{option: p.value for option, p in chosen.items()}}},
            {**part.origin, **{(name, option): p.origin[()] for option, p in chosen.items()}},
            part.source,
            next((p.sweep for p in reversed(chosen.values())), part.sweep),
        )
        for chosen in combinations(swept, part.source)
    ]


def combinations(axes: Mapping[str, Sequence[Part]], source: Source) -> Iterable[dict[str, Part]]:
    """Return every combination of one part an axis, the last axis fastest.

    Raises:
        ConfigError: There are too many.
    """
    if math.prod(map(len, axes.values())) > MAX_CELLS:
        longest = max(axes, key=lambda axis: len(axes[axis]))
        raise ConfigError(f"{axes[longest][0].place(())}: lists stand for more than {MAX_CELLS} combinations")
    return [dict(zip(axes, chosen, strict=True)) for chosen in product(*axes.values())]


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _depth(value: object) -> int:
    """Return how many lists are inside one another: 0 for a number, 2 for [[1], [2]]."""
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


def _depth_of_type(annotation: Any) -> float:  # noqa: ANN401  whatever an option is
    """Return the same of the values that an option takes; of one that takes anything no list is a sweep."""
    try:
        return _depth_of_schema(TypeAdapter(annotation).json_schema())
    except PydanticUserError:  # a type that JSON has no word for
        return math.inf


def _depth_of_schema(schema: Mapping[str, Any]) -> float:
    if "anyOf" in schema:
        return max(map(_depth_of_schema, schema["anyOf"]))
    if schema.get("type") == "array":
        return 1 + max(map(_depth_of_schema, [schema.get("items", {"type": "any"}), *schema.get("prefixItems", [])]))
    return 0 if {"type", "enum", "const", "$ref"} & schema.keys() else math.inf
