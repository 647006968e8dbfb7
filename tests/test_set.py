"""`--set` and `--only`: what they replace and keep, and how a mistake in them is named."""

from collections.abc import Callable
from typing import Any

import pytest

from testbed.config.experiment import Choice, Experiment, Timing
from tests.yaml_texts import BASE, error_of

LISTED = "backends: [naive, vmap]\n"
SETTINGS: dict[str, tuple[str, Callable[[Experiment], Any], Any]] = {
    "a number": ("batch_size=32", lambda e: e.problems[0].batch_size, 32),
    "spaces": (" batch_size = 32 ", lambda e: e.problems[0].batch_size, 32),
    "a comment": ("batch_size=32 # enough", lambda e: e.problems[0].batch_size, 32),
    "nested": ("timing.rounds=5", lambda e: e.timing, Timing(rounds=5)),
    "a whole mapping": ("timing={warmup: 0}", lambda e: e.timing, Timing(warmup=0)),
    "an item": ("backends.1=opacus", lambda e: e.backends, (Choice.of("naive"), Choice.of("opacus"))),
    "a list": ("backends=[opacus]", lambda e: e.backends, (Choice.of("opacus"),)),
    "nothing": ("backends=", lambda e: e.backends, None),
    "a name by its options": ("data.random.classes=3", lambda e: e.problems[0].data, Choice.of("random", classes=3)),
    "an item by its options": (
        "backends.1.vmap.chunk_size=3",
        lambda e: e.backends[1],  # type: ignore[index]
        Choice.of("vmap", chunk_size=3),
    ),
    "a default by its options": ("agreement.allclose.atol=1e-5", lambda e: e.agreement.options, {"atol": 1e-5}),
    "an equals sign": ("description=a=b", lambda e: e.description, "a=b"),
    "an expectation": ("expect.vmap=ok", lambda e: e.expect, {"vmap": "ok"}),
}


@pytest.mark.parametrize(("assignment", "field", "value"), SETTINGS.values(), ids=SETTINGS)
def test_set_replaces(load: Any, assignment: str, field: Callable[[Experiment], Any], value: object) -> None:
    assert field(load(BASE + LISTED, [assignment])) == value


def test_the_last_set_wins(load: Any) -> None:
    assert load(BASE, ["batch_size=3", "batch_size=4"]).problems[0].batch_size == 4


BAD_SETTINGS = {
    "batch_size": "expected KEY=VALUE, such as batch_size=32 or timing.rounds=5",
    "=3": "expected KEY=VALUE, such as batch_size=32 or timing.rounds=5",
    "batchsize=3": "unknown key 'batchsize' (did you mean 'batch_size'?); allowed: ",
    "timing.round=3": "unknown key 'round' (did you mean 'rounds'?); allowed: rounds, max_s, warmup",
    "3=x": "unknown key '3'; allowed: ",
    "batch_size=-3": "'batch_size': should be greater than 0, found -3",
    "batch_size=": "'batch_size': should be a whole number, found nothing",
    "batch_size.x=3": "'batch_size': should be a whole number, found {'x': 3}",
    "batch_size=[3, 0]": "'batch_size': should be greater than 0, found 0",
    "exclude=[{backend: vmpa}]": "unknown backend 'vmpa' (did you mean 'vmap'?); available: naive, vmap in this exper",
    "timing=3": "'timing': should be a mapping, {key: value}, found 3",
    "backends.2=vmap": "there is no 'backends.2'",
    "backends.-1=vmap": "there is no 'backends.-1'",
    "backends.x=vmap": "there is no 'backends.x'",
    "backends.1=vmpa": "unknown backend 'vmpa' (did you mean 'vmap'?); available: ",
    "backends=[naive, vmpa]": "unknown backend 'vmpa' (did you mean 'vmap'?); available: ",
    "backends.1.chunk_size=3": "'backends.1': should be a name, or {name: {option: value}}, found {'vmap': {}, 'chunk_",
    "data.digits.size=3": "'data': should be a name, or {name: {option: value}}, found {'random': {}, 'digits'",
    "model=[mlp": "not YAML: expected ',' or ']', but got '<stream end>'",
    "model=!foo mlp": "the tag '!foo' is not allowed; an experiment holds names, numbers and lists",
    "model=a\n---\nb": "a second document; one file holds one experiment",
}


@pytest.mark.parametrize(("assignment", "says"), BAD_SETTINGS.items(), ids=map(repr, BAD_SETTINGS))
def test_bad_set_is_named(load: Any, assignment: str, says: str) -> None:
    shown = assignment.replace("\n", "\\n")
    assert error_of(load, BASE + LISTED, [assignment]).startswith(f"--set {shown}: {says}")


def test_mistake_in_the_file_keeps_its_place_beside_set(load: Any) -> None:
    assert ":4:13: 'batch_size'" in error_of(load, BASE + "batch_size: x", ["timing.rounds=3", "model=mlp"])


def test_only_unknown(load: Any) -> None:
    message = error_of(load, BASE + LISTED, [], ["vmpa"])
    assert message == "--only: unknown backend 'vmpa' (did you mean 'vmap'?); available: naive, vmap in this experiment"


def test_only_keeps_what_is_said_of_the_kept(load: Any) -> None:
    yaml = BASE + LISTED + "baseline: vmap\nexpect: {naive: ok, vmap: ok}"
    kept, other = load(yaml, [], ["vmap"]), load(yaml, [], ["naive"])
    assert (kept.backends, kept.baseline, kept.expect) == ((Choice.of("vmap"),), "vmap", {"vmap": "ok"})
    assert (other.backends, other.baseline, other.expect) == ((Choice.of("naive"),), None, {"naive": "ok"})
