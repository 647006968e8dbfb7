"""Sizes: the chosen one stands in place of the experiment's keys, `--set` comes after it, mistakes keep their place."""

from typing import Any

import pytest

from testbed.config.yaml_source import ConfigError

SIZED = """model: mlp
data: random
loss: nll
batch_size: 64
timing: {rounds: 7}
size: large
sizes:
  large: {}
  small: {model: {mlp: {hidden: [8]}}, batch_size: 4}
  bad: {batch_size: x}
"""


CHOSEN = {
    "the file's": ([], "mlp 64"),
    "another": (["size=small"], "mlp(hidden=[8]) 4"),
    "none": (["size=null"], "mlp 64"),
    "set after the size, whatever the order": (["batch_size=2", "size=small"], "mlp(hidden=[8]) 2"),
    "set inside what the size put there": (["size=small", "model.mlp.hidden=[4]"], "mlp(hidden=[4]) 4"),
    "a size that is set": (["sizes.small.batch_size=3", "size=small"], "mlp(hidden=[8]) 3"),
    "a size that is new": (["size=tiny", "sizes.tiny.batch_size=1"], "mlp 1"),
}


@pytest.mark.parametrize(("assignments", "expected"), CHOSEN.values(), ids=CHOSEN)
def test_the_keys_of_the_size_stand_in_place_of_the_experiments(load: Any, assignments: Any, expected: str) -> None:
    (problem,) = load(SIZED, assignments).problems
    assert f"{problem.model} {problem.batch_size}" == expected


def test_what_the_size_leaves_out_stays(load: Any) -> None:
    assert load(SIZED, ["size=small"]).timing.rounds == 7


def test_the_resolved_experiment_names_the_size_and_reads_back_as_the_same(load: Any) -> None:
    experiment = load(SIZED, ["size=small"])
    assert (experiment.size, experiment.sizes) == ("small", {"small": {}})
    assert load(experiment.to_yaml()).problems == experiment.problems


PUBLISHED = SIZED + "published:\n  - "
MISTAKES = {
    "unknown size": (SIZED, ["size=smal"], "--set size=smal: unknown size 'smal' (did you mean 'small'?); available: "),
    "size is a number": (SIZED.replace("size: large", "size: 3"), [], "e.yaml:6:7: unknown size '3'; available: "),
    "size is a list": (SIZED.replace("size: large", "size: [small]"), [], "e.yaml:6:7: unknown size '['small']'"),
    "no sizes": (SIZED[: SIZED.index("sizes")], [], "e.yaml:6:7: unknown size 'large'; available: none in 'sizes'"),
    "sizes is a list": (
        SIZED,
        ["sizes=[1]"],
        "--set sizes=[1]: 'sizes': should be mappings by name, such as sizes: {small",
    ),
    "a size is a number": (SIZED, ["sizes.small=1"], "--set sizes.small=1: 'sizes.small': should be mappings by name"),
    "misspelt key": (SIZED.replace("4}", "4, sed: 1}"), [], "e.yaml:9:55: unknown key 'sed' (did you mean 'seed'?)"),
    "a size in a size": (SIZED.replace("4}", "4, size: a}"), [], "e.yaml:9:55: unknown key 'size'; allowed: model, "),
    "mistake in the chosen size": (SIZED, ["size=bad"], "e.yaml:10:21: 'batch_size': should be a whole number"),
    "published: no source": (
        PUBLISHED + "{figure: 3}",
        [],
        "e.yaml:12:5: 'published.0.source' is required: The publication",
    ),
    "published: misspelt": (PUBLISHED + "{source: A, figur: 3}", [], "e.yaml:12:17: unknown key 'figur' (did you mean"),
    "published: zero": (PUBLISHED + "{source: A, figure: 0}", [], "e.yaml:12:25: 'published.0.figure': should be gre"),
    "published: quantity": (
        PUBLISHED + "{source: A, quantity: norm}",
        [],
        "e.yaml:12:27: unknown quantity 'norm' (did",
    ),
    "published: backend": (PUBLISHED + "{source: A, backend: vmpa}", [], "e.yaml:12:26: unknown backend 'vmpa' (did"),
}


@pytest.mark.parametrize(("text", "assignments", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_with_its_place(load: Any, text: str, assignments: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(text, assignments)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
