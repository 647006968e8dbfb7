"""YAML as it is meant: names, numbers, lists and mappings, each with the place it stands at; nothing is run.

PyYAML parses; what is made of it is decided here: YAML 1.2 scalars (`1e-5` is a number, `10:30` and `on` are strings),
no tags, no duplicate keys, no second document, and no more nodes than a person would write.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import yaml

KeyPath: TypeAlias = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_NODES = 10_000  # after aliases are expanded: a few nested anchors can stand for billions

_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "true": True, "false": False}
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class ConfigError(Exception):
    """A mistake in an experiment or on the command line: `place: what, found, allowed`, in one line."""


class Source:
    """A parsed YAML text: `data`, and where each part of it stands."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self._keys: dict[KeyPath, yaml.Mark] = {}
        self._values: dict[KeyPath, yaml.Mark] = {}
        self._replaced: dict[KeyPath, str] = {}
        self._nodes = 0
        self.data = self._construct(self._parse(text), (), ())

    def place(self, path: KeyPath, *, key: bool = False) -> str:
        """Return `file:line:col` of the value (or the key) at a path, or of what is nearest above it."""
        for length in range(len(path), -1, -1):
            part = path[:length]
            if part in self._replaced:
                return self._replaced[part]
            marks = self._keys if key and length == len(path) else self._values
            if part in marks:
                return self._at(marks[part])
        return self.name

    def replace(self, assignment: str) -> None:
        """Apply `KEY=VALUE` from the command line: KEY is dotted, VALUE is YAML."""
        key, equals, text = assignment.partition("=")
        option = f"--set {assignment}"
        if not equals or not key.strip():
            raise ConfigError(f"{option}: expected KEY=VALUE, such as batch_size=32 or timing.rounds=5")
        value = Source(text, option).data
        path = tuple(int(part) if part.isdecimal() else part for part in key.strip().split("."))
        here = self.data
        for depth, part in enumerate(path[:-1]):
            if isinstance(here, dict) and not isinstance(here.get(part), dict | list):
                # `--set data.random.classes=3` on `data: random` gives the name its options
                here[part] = {here[part]: {}} if isinstance(here.get(part), str) else {}
            try:
                here = here[part]
            except (KeyError, IndexError, TypeError):
                raise ConfigError(f"{option}: there is no '{'.'.join(map(str, path[: depth + 1]))}'") from None
        try:
            here[path[-1]] = value
        except (IndexError, TypeError):
            raise ConfigError(f"{option}: there is no '{'.'.join(map(str, path))}'") from None
        self._replaced[path] = option

    def _parse(self, text: str) -> yaml.Node:
        try:
            documents = list(_first_two(yaml.compose_all(text, Loader=yaml.BaseLoader)))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = self._at(mark) if mark else self.name
            raise ConfigError(f"{place}: not YAML: {error.problem or error.context}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{self.name}: not YAML: {str(error).splitlines()[0]}") from None
        except RecursionError:
            raise ConfigError(f"{self.name}: nested too deeply") from None
        if not documents or documents[0] is None:
            raise ConfigError(f"{self.name}: the file is empty; expected keys such as 'model', 'data' and 'loss'")
        if len(documents) > 1:
            raise ConfigError(f"{self._at(documents[1].start_mark)}: a second document; one file holds one experiment")
        return documents[0]

    def _construct(self, node: yaml.Node, path: KeyPath, above: tuple[yaml.Node, ...]) -> Any:  # noqa: ANN401  YAML data
        self._values.setdefault(path, node.start_mark)
        self._nodes += 1
        place = self._at(node.start_mark)
        if self._nodes > MAX_NODES:
            raise ConfigError(f"{place}: aliases expand to more than {MAX_NODES} nodes")
        if node in above:
            raise ConfigError(f"{place}: an alias refers to what contains it")
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.split(":")[-1] not in ("str", "seq", "map"):
            raise ConfigError(
                f"{place}: the tag '{node.tag}' is not allowed; an experiment holds names, numbers and lists"
            )
        above = (*above, node)
        if isinstance(node, yaml.SequenceNode):
            return [self._construct(item, (*path, i), above) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, above)
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return _scalar(node.value) if plain else node.value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, above: tuple[yaml.Node, ...]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self._at(key_node.start_mark)}: a key must be a name")
            key = key_node.value
            if key in found:
                first = self._keys[(*path, key)].line + 1
                raise ConfigError(f"{self._at(key_node.start_mark)}: duplicate key '{key}', first in line {first}")
            self._keys[(*path, key)] = key_node.start_mark
            found[key] = self._construct(value_node, (*path, key), above)
        return found

    def _at(self, mark: yaml.Mark) -> str:
        return f"{self.name}:{mark.line + 1}:{mark.column + 1}"


def read(file: str | Path) -> Source:
    """Read a YAML file.

    Raises:
        ConfigError: It cannot be read, or is not the YAML of an experiment.
    """
    path = Path(file)
    if path.is_dir():
        raise ConfigError(f"{file}: is a directory, expected a YAML file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{file}: larger than {MAX_BYTES} bytes, expected an experiment in YAML")
        text = path.read_bytes().decode()
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"{file}: no such file{'; there are ' + ', '.join(near) if near else ''}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not a text file (byte {error.start} is not UTF-8), expected YAML") from None
    return Source(text, str(file))


def _scalar(text: str) -> Any:  # noqa: ANN401  the point is to find the type
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _first_two(documents: Iterator[yaml.Node]) -> Iterator[yaml.Node]:
    for count, document in enumerate(documents):
        yield document
        if count:
            return
