"""YAML as it is meant: names, numbers, lists and mappings, each with the place it stands at; nothing is run.

PyYAML parses; what is made of it is decided here: YAML 1.2 scalars (`1e-5` is a number, `10:30` and `on` are strings),
no tags, no duplicate keys, no second document, and no more nodes than a person would write.
"""

import difflib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from yaml.reader import ReaderError

KeyPath: TypeAlias = tuple[str | int, ...]

MAX_BYTES = 100_000  # a thousand times an experiment; parsing more than that takes longer than a user waits
MAX_NODES = 10_000  # after aliases are expanded: a few nested anchors can stand for billions
SHOWN = 5  # files, of all that are there instead of one that is not
MAX_DEPTH = 50  # likewise; Python's own limit of recursion is not far above

_WORDS: dict[str, Any] = {"": None, "~": None}  # and `null`, `true`, `false` as YAML 1.2 spells them
for _word, _value in {"null": None, "true": True, "false": False}.items():
    _WORDS |= dict.fromkeys((_word, _word.capitalize(), _word.upper()), _value)
_INT = re.compile(r"[-+]?[0-9]{1,4000}")  # Python reads no longer ones
_OTHER_BASE = re.compile(r"0o[0-7]{1,4000}|0x[0-9a-fA-F]{1,4000}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NONFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class ConfigError(Exception):
    """A mistake in an experiment or on the command line: `place: what, found, allowed`, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class Source:
    """A parsed YAML text: `data`, and where each part of it stands.

    Args:
        text: The YAML.
        name: What it is called in errors.
        located: Whether errors give line and column; those of a value on the command line would help nobody.
    """

    def __init__(self, text: str, name: str, *, located: bool = True) -> None:
        self.name, self._located = name, located
        self._keys: dict[KeyPath, yaml.Mark] = {}
        self._values: dict[KeyPath, yaml.Mark] = {}
        self._replaced: dict[KeyPath, str] = {}
        self._moved: dict[KeyPath, KeyPath] = {}
        self._nodes = 0
        self.data = self._construct(self._parse(text), (), ())

    def place(self, path: KeyPath, *, key: bool = False) -> str:
        """Return `file:line:col` of the value (or the key) at a path, or of what is nearest above it.

        Where `--set` replaced that value, what holds it, or a part of it, the place is that option.
        """
        for replaced, option in reversed(self._replaced.items()):
            common = min(len(replaced), len(path))
            if path and replaced[:common] == path[:common]:
                return option
        if path[:1] in self._moved:
            return self.place((*self._moved[path[:1]], *path[1:]), key=key)
        for length in range(len(path), -1, -1):
            part = path[:length]
            marks = self._keys if key and length == len(path) else self._values
            if part in marks:
                return self._at(marks[part])
        return self._line_and_column(0, 0)

    def replace(self, assignment: str) -> None:
        """Apply `KEY=VALUE` from the command line: KEY is dotted, VALUE is YAML."""
        key, equals, text = assignment.partition("=")
        option = f"--set {assignment}"
        if not equals or not key.strip():
            raise ConfigError(f"{option}: expected KEY=VALUE, such as batch_size=32 or timing.rounds=5")
        value = Source(text, option, located=False).data
        path: KeyPath = ()
        here: Any = {"": self.data}
        inside: str | int = ""
        for part in key.strip().split("."):
            if not isinstance(here[inside], dict | list):
                # `--set data.random.classes=3` on `data: random` gives the name its options
                here[inside] = {here[inside]: {}} if isinstance(here[inside], str) else {}
            here = here[inside]
            inside = int(part) if isinstance(here, list) and part.isdecimal() else part
            path = (*path, inside)
            if isinstance(here, dict):
                here.setdefault(inside, None)
            elif not (isinstance(inside, int) and inside < len(here)):
                raise ConfigError(f"{option}: there is no '{'.'.join(map(str, path))}'")
        here[inside] = value
        self._replaced[path] = option

    def move(self, path: KeyPath, key: tuple[str]) -> None:
        """Put the value at a path in place of a top-level key's; its place stays where it stands in the file."""
        value = self.data
        for part in path:
            value = value[part]
        self.data[key[0]] = value
        self._moved[key] = path

    def _parse(self, text: str) -> yaml.Node | None:
        try:
            documents = list(_first_two(yaml.compose_all(text, Loader=yaml.BaseLoader)))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = self._at(mark) if mark else self.name
            raise ConfigError(f"{place}: not YAML: {error.problem or error.context}") from None
        except ReaderError as error:
            before = text[: error.position]
            place = self._line_and_column(before.count("\n"), len(before) - before.rfind("\n") - 1)
            raise ConfigError(f"{place}: not YAML: a control character ({chr(error.character)!r})") from None
        except RecursionError:
            place = self._line_and_column(0, 0)
            raise ConfigError(f"{place}: nested too deeply; at most {MAX_DEPTH} levels are allowed") from None
        if len(documents) > 1:
            raise ConfigError(f"{self._at(documents[1].start_mark)}: a second document; one file holds one experiment")
        return documents[0] if documents else None

    def _construct(self, node: yaml.Node | None, path: KeyPath, above: tuple[yaml.Node, ...]) -> Any:  # noqa: ANN401
        if node is None:
            return None
        self._values.setdefault(path, node.start_mark)
        self._nodes += 1
        place = self._at(node.start_mark)
        if self._nodes > MAX_NODES:
            whole = self.place(path[:1], key=True)  # an alias has no place of its own, the key above it has
            raise ConfigError(f"{whole}: more than {MAX_NODES} values, aliases expanded")
        if node in above:
            raise ConfigError(f"{place}: an alias refers to what contains it")
        if len(above) > MAX_DEPTH:
            raise ConfigError(f"{place}: nested too deeply; at most {MAX_DEPTH} levels are allowed")
        self._refuse_tag(node)
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
            self._refuse_tag(key_node)
            key = key_node.value
            if key in found:
                first = self._keys[(*path, key)].line + 1
                raise ConfigError(f"{self._at(key_node.start_mark)}: duplicate key '{key}', first in line {first}")
            self._keys[(*path, key)] = key_node.start_mark
            found[key] = self._construct(value_node, (*path, key), above)
        return found

    def _refuse_tag(self, node: yaml.Node) -> None:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in ("str", "seq", "map"):
            tag = kind if kind == node.tag else f"!!{kind}"
            place = self._at(node.start_mark)
            raise ConfigError(f"{place}: the tag '{tag}' is not allowed; an experiment holds names, numbers and lists")

    def _at(self, mark: yaml.Mark) -> str:
        return self._line_and_column(mark.line, mark.column)

    def _line_and_column(self, line: int, column: int) -> str:
        return f"{self.name}:{line + 1}:{column + 1}" if self._located else self.name


def read(file: str | Path) -> Source:
    """Read a YAML file.

    Raises:
        ConfigError: It cannot be read, or is not the YAML of an experiment.
    """
    path = Path(file)
    try:
        with path.open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)  # a device or a pipe has no size to ask for
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{file}: larger than {MAX_BYTES} bytes, expected an experiment in YAML")
        text = content.decode()
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file{_instead(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{file}: is a directory, expected a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not a text file (byte {error.start} is not UTF-8), expected YAML") from None
    return Source(text, str(file))


def experiments(name: str) -> list[Path]:
    """Return the experiments of this name, here and in the folder `experiments`; results are none."""
    found = [Path(f"{name}.yaml"), *sorted(Path("experiments").glob("**/*.yaml"))]
    return [file for file in found if file.stem == name and "results" not in file.parts and file.is_file()]


def _instead(path: Path) -> str:
    """Return what there is instead of a file: those of almost its name, else the first few."""
    there = sorted(path.parent.glob("*.yaml")) or sorted(Path("experiments").glob("*.yaml"))
    names = difflib.get_close_matches(path.stem, [file.stem for file in there], n=SHOWN)
    near = [str(file) for file in there if file.stem in names] or [str(file) for file in there]
    more = f", … ({len(near)} in all)" if len(near) > SHOWN else ""
    return f"; there are {', '.join(near[:SHOWN])}{more}" if near else ""


def write(data: Any, *, inline: bool = False) -> str:  # noqa: ANN401  YAML data
    """Return plain data as YAML that `read` reads as the same data; on one line if `inline`."""
    style: dict[str, Any] = {"default_flow_style": True, "width": math.inf} if inline else {}
    text = str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style))
    return text.removesuffix("...\n").strip() if inline else text


class _Dumper(yaml.SafeDumper):
    """Quotes more than PyYAML does: text that YAML 1.2 reads as a number, such as "1e-5", and what is not printable."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = _scalar(text) == text and text.isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_text)


def _scalar(text: str) -> Any:  # noqa: ANN401  the point is to find the type
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _OTHER_BASE.fullmatch(text):
        return int(text, 0)
    if _NONFINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return float(text) if _FLOAT.fullmatch(text) else text


def _first_two(documents: Iterator[yaml.Node]) -> Iterator[yaml.Node]:
    for count, document in enumerate(documents):
        yield document
        if count:
            return
