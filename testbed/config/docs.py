"""The tables of `experiments/README.md`, made from the schema and the registries so that they cannot be wrong.

`python -m testbed.config.docs` writes them anew; a test fails until it has been run.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined

from backends import available
from backends.base import BACKENDS, QUANTITIES, Backend
from backends.registry import options_of
from testbed.agreement import RULES
from testbed.config.experiment import Choice, Experiment, Published, Workload
from testbed.config.yaml_source import write
from testbed.problems import DATA, LOSSES, MODELS
from testbed.records import STATUSES

README = Path(__file__).parents[2] / "experiments" / "README.md"
BLOCK = re.compile(r"(?<=<!-- schema -->\n).*?(?=<!-- /schema -->)", re.DOTALL)
WORDS = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}

Thing = Callable[..., Any]


def rewrite(readme: str) -> str:
    """Return the README with its tables made anew."""
    return BLOCK.sub(lambda _: f"\n{tables()}\n", readme)


def tables() -> str:
    """Return every table: keys, names by kind, options, statuses."""
    kinds = _kinds()
    sections = {"Keys": _table(("key", "type", "default", "meaning"), _keys(Experiment))}
    for key, things in kinds.items():
        rows = [(f"`{name}`", _summary(thing)) for name, thing in things.items()]
        sections[f"Names for `{key}`"] = _table(("name", "what it is"), rows)
    everybody = {"every backend": Backend}
    options = [row for key, things in kinds.items() for row in _options(key, things)]
    options += _options("backends", everybody, inherited=True)
    sections["Options"] = _table(("of", "name", "option", "type", "default", "meaning"), options)
    statuses = [(f"`{status}`", meaning) for status, meaning in STATUSES.items()]
    sections["Statuses"] = _table(("status", "meaning"), statuses)
    return "\n".join(f"### {title}\n\n{table}" for title, table in sections.items())


def _kinds() -> dict[str, dict[str, Thing]]:
    """Return what can be named under which key; only what comes with the testbed, not what is installed beside it."""
    available()  # discovery fills the registry
    registries: dict[str, Any] = {"model": MODELS, "data": DATA, "loss": LOSSES, "agreement": RULES}
    kinds: dict[str, dict[str, Thing]] = {key: {name: r[name] for name in r} for key, r in registries.items()}
    kinds["backends"] = {name: BACKENDS[name] for name in BACKENDS}
    kinds["quantities"] = {name: getattr(Backend, name) for name in QUANTITIES}
    ours = ("backends.", "testbed.")
    return {key: {n: t for n, t in things.items() if t.__module__.startswith(ours)} for key, things in kinds.items()}


def _keys(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, ...]]:
    """Yield a row for each key; a mapping's own keys stand in its place."""
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        if name == "problems":
            yield from ((key, f"{kind}; or a list", *rest) for key, kind, *rest in _keys(Workload))
            yield f"`{name}`", "[{key: value, …}, …], not empty", "`null`", field.description or ""
            continue
        if name == "published":
            yield f"`{name}`", "[{key: value, …}, …]", "`[]`", field.description or ""
            yield from _keys(Published, f"{name}.N.")
            continue
        if isinstance(field.default, BaseModel) and not isinstance(field.default, Choice):
            yield from _keys(type(field.default), f"{above}{name}.")
            continue
        kind = _type(schema["properties"][name])
        yield f"`{above}{name}`", kind, _default(field.default), field.description or ""


def _options(key: str, things: Mapping[str, Thing], *, inherited: bool = False) -> Iterator[tuple[str, ...]]:
    """Yield a row for each option; those that every backend inherits are not said of each."""
    common = {} if inherited else options_of(Backend)
    for name, thing in things.items():
        meanings = _documented(thing)
        for option, parameter in options_of(thing).items():
            if key == "backends" and option in common:
                continue
            kind = _type(TypeAdapter(parameter.annotation).json_schema())
            default = PydanticUndefined if parameter.default is parameter.empty else parameter.default
            shown = name if inherited else f"`{name}`"
            yield f"`{key}`", shown, f"`{option}`", kind, _default(default), meanings.get(option, "")


def _summary(thing: Thing) -> str:
    """Return the first paragraph of a docstring, without what is said to programmers only."""
    paragraph = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
    return paragraph.removeprefix("Build the function for ")


def _documented(thing: Thing) -> dict[str, str]:
    """Return what a docstring's section `Options:` says of each option."""
    section = re.search(r"^Options:\n((?:[ ]+.*\n?)*)", inspect.getdoc(thing) or "", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: re.sub(r"\s+", " ", meaning) for name, meaning in entries}


def _type(schema: Mapping[str, Any]) -> str:
    """Return a JSON schema as a few words, in the notation of YAML."""
    if "$ref" in schema:
        return "name"  # a Choice: the only model that is not shown by its own keys
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        return f"[{_type(schema['items'])}, …]" + (", not empty" if schema.get("minItems") else "")
    if schema["type"] == "object" and schema["additionalProperties"] is True:
        return "{key: value, …}"
    if schema["type"] == "object":
        return f"{{name: {_type(schema['additionalProperties'])}, …}}"
    bounds = [f"{sign} {_number(schema[key])}" for key, sign in BOUNDS.items() if key in schema]
    return " ".join([WORDS[schema["type"]], ", ".join(bounds)]).strip()


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


def _default(value: object) -> str:
    if value is PydanticUndefined:
        return "required"
    return f"`{write(_plain(value), inline=True)}`"


def _plain(value: object) -> Any:  # noqa: ANN401  recursion over plain data
    if isinstance(value, Choice):
        return value.plain()
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    README.write_text(rewrite(README.read_text(encoding="utf-8")), encoding="utf-8")
