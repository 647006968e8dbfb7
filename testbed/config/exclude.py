"""`exclude`: every entry is checked to match something, so that none is a slip that nobody notices."""

from collections.abc import Collection, Mapping
from typing import Any

from backends.registry import did_you_mean
from testbed.config.experiment import Choice, Experiment, Workload, is_meant, matches, several
from testbed.config.yaml_source import ConfigError, KeyPath, Source
from testbed.records import with_options

HERE = "in this experiment"
KEYS = ("backend", "quantity", *Workload.model_fields)

Facts = Mapping[str, Any]


def check_exclude(experiment: Experiment, source: Source, *, drop_useless: bool = False) -> Experiment:
    """Return the experiment if every entry of its `exclude` matches something, and something is left.

    Args:
        experiment: The experiment.
        source: Where it stands.
        drop_useless: Leave out entries that match nothing: `--set` has changed what there is.

    Raises:
        ConfigError: One line: place, what, found, allowed.
    """
    cells = [combination.facts() for combination in experiment.combinations()]
    for i, entry in enumerate(experiment.exclude):
        for key in entry:
            if key not in KEYS:
                place = source.place(("exclude", i, key), key=True)
                raise ConfigError(f"{place}: unknown key '{key}'{did_you_mean(key, KEYS)}; allowed: {', '.join(KEYS)}")
        if not drop_useless:
            _refuse_useless(entry, cells, ("exclude", i), source)
    if drop_useless:
        experiment = experiment.model_copy(update={"exclude": useful(experiment)})
    if not experiment.chosen():
        raise ConfigError(f"{source.place(('exclude',))}: 'exclude' leaves no cell to run")
    return experiment


def useful(experiment: Experiment) -> tuple[Facts, ...]:
    """Return the entries of `exclude` that match something, without values that no cell they match has."""
    cells = [combination.facts() for combination in experiment.combinations()]
    found = ((entry, [cell for cell in cells if matches(entry, cell)]) for entry in experiment.exclude)
    return tuple({key: _met(key, entry[key], mine) for key in entry} for entry, mine in found if mine)


def _met(key: str, wanted: Any, cells: Collection[Facts]) -> Any:  # noqa: ANN401  whatever an entry asks for
    """Return those of several values that some cell has."""
    if not isinstance(wanted, tuple):
        return wanted
    return tuple(value for value in wanted if any(is_meant(cell[key], value) for cell in cells))


def _refuse_useless(entry: Facts, cells: Collection[Facts], path: KeyPath, source: Source) -> None:
    """Refuse an entry with a value that no cell has, among the cells that have its values before that one."""
    if not entry:
        raise ConfigError(f"{source.place(path)}: should ask for something, found {{}}; allowed: {', '.join(KEYS)}")
    among: list[str] = []
    for key, wanted in entry.items():
        if wanted == ():
            raise ConfigError(f"{source.place((*path, key))}: '{key}': should have at least one item, found []")
        for i, value in enumerate(several(wanted)):
            if not any(is_meant(cell[key], value) for cell in cells):
                place = source.place((*path, key, *([i] if isinstance(wanted, tuple) else [])))
                there = f"where {' and '.join(among)}" if among else HERE
                raise ConfigError(f"{place}: {_unknown(key, value, [cell[key] for cell in cells])} {there}")
        cells = [cell for cell in cells if matches({key: wanted}, cell)]
        among.append(f"{key} is {' or '.join(map(_said, several(wanted)))}")


def _unknown(key: str, value: object, there_is: Collection[Any]) -> str:
    """Return the sentence for a value that there is not: what was asked, what there is."""
    known = list(dict.fromkeys(map(_said, there_is)))  # in the experiment's order
    names = [choice.name for choice in there_is if isinstance(choice, Choice)]
    meant = did_you_mean(_said(value), [*names, *known]) if isinstance(value, str) else ""
    return f"unknown {key} '{_said(value)}'{meant}; available: {', '.join(known)}"


def _said(value: object) -> str:
    """Return a value as tables say it: a name with its options in brackets."""
    if isinstance(value, dict) and len(value) == 1:
        name, options = next(iter(value.items()))
        return with_options(name, options) if isinstance(options, dict) else str(name if options is None else value)
    if isinstance(value, bool):
        return str(value).lower()
    return "nothing" if value is None else str(value)
