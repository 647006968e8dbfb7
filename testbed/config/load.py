"""YAML → `Experiment`: sweeps are written out, and every mistake is one line with its place."""

from collections.abc import Collection, Mapping, Sequence
from itertools import filterfalse
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from backends import available
from backends.base import BACKENDS, QUANTITIES, Backend
from backends.registry import did_you_mean, explain, unknown
from testbed.config.exclude import HERE, check_exclude, useful
from testbed.config.expand import MAX_CELLS, Known, Part, choices, combinations, items
from testbed.config.experiment import Experiment, Limits, Published, Timing, Workload
from testbed.config.names import REGISTRIES, check_names
from testbed.config.sizes import apply_size, of_size
from testbed.config.yaml_source import ConfigError, KeyPath, Source, read

T = TypeVar("T", bound=BaseModel)
NESTED: dict[str, type[BaseModel]] = {"timing": Timing, "limits": Limits, "published": Published}
"""The mappings in an experiment that have keys of their own."""


def load_experiment(file: str | Path, assignments: Sequence[str] = (), only: Sequence[str] = ()) -> Experiment:
    """Read an experiment.

    Args:
        file: The YAML file.
        assignments: `KEY=VALUE` strings that replace parts of it.
        only: Names of the backends to keep; all if empty.

    Raises:
        ConfigError: One line: place, what, found, allowed.
    """
    source = read(file)
    if not isinstance(source.data, dict):
        expected = "expected keys such as 'model', 'data' and 'loss'"
        raise ConfigError(f"{source.place(())}: {expected}, found {_kind(source.data)}")
    for assignment in filter(of_size, assignments):
        source.replace(assignment)
    apply_size(source, keys())
    for assignment in filterfalse(of_size, assignments):
        source.replace(assignment)
    available()  # discovery fills the registry
    replaced = bool(assignments) and not any(a.lstrip().startswith("exclude") for a in assignments)
    experiment = check_exclude(_read(source), source, drop_useless=replaced)
    return _keep(experiment, only) if only else experiment


def keys() -> list[str]:
    """Return the keys of an experiment, in the order of its reference."""
    found = list(Experiment.model_fields)
    where = found.index("problems")
    return [*found[:where], *Workload.model_fields, *found[where:]]


def _read(source: Source) -> Experiment:
    """Return the experiment, every name and option checked against the registries, before anything is built."""
    data = source.data
    _refuse_unknown(data, keys(), (), source)
    problems = _problems(source)
    lists = {
        "quantities": _sweep(source, "quantities", {name: getattr(Backend, name) for name in QUANTITIES}),
        "backends": _sweep(source, "backends", BACKENDS),
    }
    listed = [((key, i), part) for key, parts in lists.items() for i, part in enumerate(parts)]
    origin = {(*where, *path): o for where, part in listed for path, o in part.origin.items()}
    values = {key: [part.value for part in parts] for key, parts in lists.items() if parts}
    plain = {key: value for key, value in data.items() if key not in Workload.model_fields}
    workloads = [_validated(Workload, part.value, part) for part in problems]
    rest = Part({**plain, **values, "problems": workloads}, {(): (), **origin}, source)
    experiment = _validated(Experiment, rest.value, rest)
    check_names(experiment, problems, lists, rest)
    cells = len(experiment.problems) * len(experiment.quantities) * len(experiment.resolved_backends())
    if cells > MAX_CELLS:
        raise ConfigError(f"{source.place(())}: {cells} cells (problem × quantity × backend); at most {MAX_CELLS}")
    return experiment


def _problems(source: Source) -> list[Part]:
    """Return every problem that the keys of problems stand for, at the top level and in each of `problems`."""
    data = source.data
    top = {key: ((key,), data[key]) for key in Workload.model_fields if key in data}
    entries: Any = data.get("problems")
    listed = entries is not None
    if listed and not isinstance(entries, list):
        raise _not_mappings(("problems",), entries, source)
    found: list[Part] = []
    for part in items(entries, ("problems",), source) if listed else [Part({}, {(): ()}, source)]:
        where = part.origin[()]
        if not isinstance(part.value, dict):
            raise _not_mappings(where, part.value, source)
        _refuse_unknown(part.value, Workload.model_fields, where, source)
        given = {**top, **{key: ((*where, key), value) for key, value in part.value.items()}}
        axes = {key: _axis(key, *given[key], source) for key in Workload.model_fields if key in given}
        for chosen in combinations(axes, source):
            value = {key: p.value for key, p in chosen.items()}
            origin = {(key, *path): o for key, p in chosen.items() for path, o in p.origin.items()}
            swept = [p.sweep for key, p in chosen.items() if len(axes[key]) > 1]
            found.append(Part(value, {(): where, **origin}, source, (swept or [where])[-1]))
        if len(found) > MAX_CELLS:
            raise ConfigError(f"{source.place(where)}: more than {MAX_CELLS} problems")
    for key in top if listed else ():
        if all(key in entry for entry in entries):
            why = "every entry of 'problems' has its own; leave it out here or there"
            raise ConfigError(f"{source.place((key,), key=True)}: '{key}' says nothing: {why}")
    return found


def _not_mappings(path: KeyPath, found: object, source: Source) -> ConfigError:
    wanted = "should be a list of mappings, such as [{model: mlp, data: random}]"
    return ConfigError(f"{source.place(path)}: {explain({'loc': path, 'type': '', 'msg': wanted, 'input': found})}")


def _axis(key: str, path: KeyPath, value: Any, source: Source) -> list[Part]:  # noqa: ANN401  whatever the YAML holds
    """Return what a key of a problem stands for: a list's items, and of each the sweeps over options."""
    found = items(value, path, source)
    if key not in REGISTRIES:
        return found
    return [p for part in found for p in choices(part, REGISTRIES[key])]


def _sweep(source: Source, key: str, known: Known) -> list[Part]:
    """Return what the items of a list of names stand for; nothing where there is no list."""
    value = source.data.get(key)
    return [p for part in items(value, (key,), source) for p in choices(part, known)] if isinstance(value, list) else []


def _keep(experiment: Experiment, only: Sequence[str]) -> Experiment:
    chosen = experiment.resolved_backends()
    names = {c.name for c in chosen}
    for name in only:
        if name not in names:
            raise ConfigError(f"--only: {unknown('backend', name, names)} {HERE}")
    kept = tuple(c for c in chosen if c.name in only)
    expect = {b: status for b, status in experiment.expect.items() if b in {n for c in kept for n in (c.name, str(c))}}
    baseline = experiment.baseline if experiment.baseline in only else None
    found = experiment.model_copy(update={"backends": kept, "baseline": baseline, "expect": expect})
    found = found.model_copy(update={"exclude": useful(found)})
    if not found.chosen():
        raise ConfigError(f"--only: 'exclude' leaves no cell of {', '.join(only)}")
    return found


def _validated(schema: type[T], value: Any, part: Part) -> T:  # noqa: ANN401  whatever the YAML holds
    try:
        return schema.model_validate(_tuples(value))
    except ValidationError as error:
        raise ConfigError(_first_problem(error, schema, part)) from None


def _first_problem(error: ValidationError, schema: type[BaseModel], part: Part) -> str:
    """Return the first of pydantic's errors as one line with its place; a key that is misspelt is not missing."""
    problems: Any = error.errors()
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path: KeyPath = tuple(problem["loc"])
    fields = schema.model_fields if len(path) == 1 else NESTED.get(str(path[0]), schema).model_fields
    if problem["type"] == "extra_forbidden":  # keys at the top level have been looked at
        return _unknown_key(path, fields, part)
    hint = f": {fields[str(path[-1])].description}" if problem["type"] == "missing" else ""
    return f"{part.place(path)}: {explain(problem)}{hint}"


def _refuse_unknown(found: Mapping[str, Any], known: Collection[str], path: KeyPath, source: Source) -> None:
    for key in found:
        if key not in known:
            raise ConfigError(_unknown_key((*path, key), known, source))


def _unknown_key(path: KeyPath, known: Collection[str], where: Part | Source) -> str:
    asked = f"unknown key '{path[-1]}'{did_you_mean(path[-1], known)}; allowed: {', '.join(known)}"
    return f"{where.place(path, key=True)}: {asked}"


def _tuples(value: Any) -> Any:  # noqa: ANN401  recursion over YAML data
    """Return YAML data with lists as tuples: an experiment is frozen."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _kind(value: object) -> str:
    return {type(None): "nothing", list: "a list", str: "text", bool: "a truth value"}.get(type(value), "a number")
