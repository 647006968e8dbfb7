"""What a problem is called: every fact in words, and which of them several problems share."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from testbed.environment import device_name
from testbed.records import Record

GROUPS = (("model", "data", "loss", "train_steps"), ("batch_size", "seed", "dtype", "tf32"), ("device",))
"""The keys of a problem in the order of a title; groups have a dot between them."""

QUIET = {"train_steps": (0, None), "tf32": (False, None)}
"""Values that go without saying, unless other problems have others; so does every seed."""


def facts(record: Record) -> dict[str, str]:
    """Return the facts of a record's problem in words, by key."""
    return {**_words(record.problem), "device": device_name(record.environment)}


def title(problem: Mapping[str, Any]) -> str:
    """Return a problem in a line."""
    return _line(_words(problem), _loud(problem))


class Titles(NamedTuple):
    """What several problems are called.

    Attributes:
        shared: What all have in common, in a line; empty where there is one problem.
        own: What each has of its own.
        whole: Both, for each.
    """

    shared: str
    own: list[str]
    whole: list[str]


def titles(records: Sequence[Record], but: Container[str] = ()) -> Titles:
    """Return what problems are called.

    Args:
        records: One record a problem.
        but: Keys to leave out.
    """
    found = [facts(record) for record in records]
    every = [key for group in GROUPS for key in group if key not in but]
    differ = {key for key in every if len({f.get(key) for f in found}) > 1}
    loud = {key for record in records for key in {*_loud(record.problem), "device"} if key not in but}
    whole = [_line(f, loud | differ) for f in found]
    if len(records) == 1:
        return Titles("", whole, whole)
    return Titles(_line(found[0], loud - differ), [_line(f, differ) for f in found], whole)


def _words(problem: Mapping[str, Any]) -> dict[str, str]:
    said = {key: str(problem[key]) for key in ("model", "data", "loss", "dtype") if problem.get(key)}
    if (steps := problem.get("train_steps")) is not None:
        said["train_steps"] = f"trained {steps} steps" if steps else "untrained"
    if problem.get("seed") is not None:
        said["seed"] = f"seed {problem['seed']}"
    if problem.get("tf32") is not None:
        said["tf32"] = "TF32" if problem["tf32"] else "no TF32"
    if problem.get("batch_size") is not None:
        said["batch_size"] = f"N={problem['batch_size']}"
    return said


def _loud(problem: Mapping[str, Any]) -> set[str]:
    """Return the keys that are said of a problem that is alone."""
    return {key for group in GROUPS for key in group if key != "seed" and problem.get(key) not in QUIET.get(key, ())}


def _line(found: Mapping[str, str], keys: Iterable[str]) -> str:
    wanted = set(keys)
    groups = [", ".join(found[key] for key in group if key in wanted and key in found) for group in GROUPS]
    return " · ".join(group for group in groups if group)
