"""Every name and option of an experiment is known, before anything is built."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from backends.base import BACKENDS, QUANTITIES, Backend
from backends.registry import BadOption, Registry, UnknownName, check_options, options_of, unknown
from testbed.agreement import RULES
from testbed.config.exclude import HERE
from testbed.config.expand import Part
from testbed.config.experiment import Choice, Experiment
from testbed.config.yaml_source import ConfigError, KeyPath
from testbed.problems import DATA, LOSSES, MODELS
from testbed.records import STATUSES

Thing = Callable[..., Any]

REGISTRIES: dict[str, Registry[Any]] = {"model": MODELS, "data": DATA, "loss": LOSSES}
"""What can be named under which key of a problem."""


def check_names(
    experiment: Experiment, problems: Sequence[Part], lists: Mapping[str, Sequence[Part]], rest: Part
) -> None:
    """Check every name and option, and that nothing is there twice.

    Args:
        experiment: The experiment.
        problems: Where its problems stand.
        lists: Where its `quantities` and `backends` stand.
        rest: Where all else stands.

    Raises:
        ConfigError: One line: place, what, found, allowed.
    """
    checked: set[str] = set()
    for workload, part in zip(experiment.problems, problems, strict=True):
        for key, registry in REGISTRIES.items():
            choice = getattr(workload, key)
            if f"{key} {choice!r}" not in checked:  # a sweep has the same one often
                _check(registry, choice, (key,), part)
            checked.add(f"{key} {choice!r}")
    _refuse_twice("problem", experiment.problems, problems)
    _check(RULES, experiment.agreement, ("agreement",), rest)
    for i, choice in enumerate(experiment.backends or ()):
        _check(BACKENDS, choice, ("backends", i), rest)
    _refuse_twice("backend", experiment.backends or (), lists["backends"])
    for i, choice in enumerate(experiment.quantities):
        if choice.name not in QUANTITIES:
            raise ConfigError(f"{rest.place(('quantities', i))}: {unknown('quantity', choice.name, QUANTITIES)}")
        _refuse_bad_option("quantity", choice, getattr(Backend, choice.name), ("quantities", i), rest)
    _refuse_twice("quantity", experiment.quantities, lists["quantities"])
    _check_mentioned(experiment, rest)
    for i, published in enumerate(experiment.published):
        known: dict[str, Collection[str]] = {"backend": set(BACKENDS), "quantity": QUANTITIES}
        for key, there_are in known.items():
            name = getattr(published, key)
            if name is not None and name.partition("(")[0] not in there_are:
                raise ConfigError(f"{rest.place(('published', i, key))}: {unknown(key, name, there_are)}")


def _check_mentioned(experiment: Experiment, rest: Part) -> None:
    """Check that the backends of `baseline` and `expect` are run."""
    names = [c.name for c in experiment.resolved_backends()]
    labels = [str(c) for c in experiment.resolved_backends()]
    if experiment.baseline and experiment.baseline not in names:
        raise ConfigError(f"{rest.place(('baseline',))}: {unknown('baseline', experiment.baseline, names)} {HERE}")
    for name, status in experiment.expect.items():
        if name not in {*names, *labels}:
            raise ConfigError(
                f"{rest.place(('expect', name), key=True)}: {unknown('backend', name, set(names))} {HERE}"
            )
        if status not in STATUSES:
            raise ConfigError(f"{rest.place(('expect', name))}: {unknown('status', status, STATUSES)}")


def _refuse_twice(kind: str, found: Sequence[object], parts: Sequence[Part]) -> None:
    seen: set[str] = set()
    for thing, part in zip(found, parts, strict=False):  # no parts where a default stands in
        if repr(thing) in seen:
            raise ConfigError(f"{part.source.place(part.sweep)}: {kind} '{thing}' is listed twice")
        seen.add(repr(thing))


def _check(registry: Registry[Any], choice: Choice, path: KeyPath, where: Part) -> None:
    try:
        thing = registry[choice.name]
    except UnknownName as error:
        raise ConfigError(f"{where.place(path)}: {error}") from None
    _refuse_bad_option(registry.kind, choice, thing, path, where)


def _refuse_bad_option(kind: str, choice: Choice, thing: Thing, path: KeyPath, where: Part) -> None:
    try:
        check_options(kind, choice.name, thing, choice.options)
    except BadOption as error:
        unknown_option = error.path[0] not in options_of(thing)
        raise ConfigError(f"{where.place((*path, choice.name, *error.path), key=unknown_option)}: {error}") from None
