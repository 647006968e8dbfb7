"""YAML: scalars are those of YAML 1.2, what is written is read back, and anything else is one error."""

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.config.experiment import Choice, Experiment
from testbed.config.load import keys, load_experiment
from testbed.config.yaml_source import ConfigError, Source, write
from tests.yaml_texts import BASE, EVERYTHING

SHORT = st.text(max_size=20)
PROPERTY = settings(deadline=None, derandomize=True)  # a first run imports and is slow; the same examples each time


SCALARS = {
    "1e-5": 1e-5,
    "1E5": 1e5,
    ".5": 0.5,
    "5.": 5.0,
    "-3": -3,
    "+3": 3,
    "010": 10,
    "0o17": 15,
    "0x1F": 31,
    ".inf": float("inf"),
    "-.INF": -float("inf"),
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "10:30": "10:30",
    "on": "on",
    "yes": "yes",
    "no": "no",
    "1_000": "1_000",
    "2020-01-01": "2020-01-01",
    "1.2.3": "1.2.3",
    "e5": "e5",
    "'3'": "3",
    '"true"': "true",
    "''": "",
    "tRUE": "tRUE",
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items(), ids=map(repr, SCALARS))
def test_scalar_is_that_of_yaml_1_2(text: str, value: object) -> None:
    found = Source(f"x: {text}", "text").data["x"]
    assert (type(found), found) == (type(value), value)


def test_numbers_are_read_as_what_the_key_wants(load: Any) -> None:
    experiment = load(BASE + "timing: {max_s: 1e-5}\ndescription: 10:30")
    assert (experiment.timing.max_s, experiment.description) == (1e-5, "10:30")


def test_anchors_may_be_used(load: Any) -> None:
    experiment = load("model: &name mlp\ndata: random\nloss: nll\ndescription: *name")
    assert experiment.description == "mlp"


def test_byte_order_mark_and_windows_line_ends_are_read(load: Any) -> None:
    assert load("\ufeff" + BASE.replace("\n", "\r\n")).problems[0].loss == Choice.of("nll")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN, st.booleans())
@settings(PROPERTY, max_examples=100)
def test_written_data_is_read_back(data: Any, inline: bool) -> None:
    text = write(data, inline=inline)
    assert Source(text, "text").data == data
    assert not inline or "\n" not in text


LINES = [*EVERYTHING.splitlines(), *BASE.splitlines(), "---", "x: &a [*a]", "  - &b", "? *b", "!!int", "timing:", "- 1"]
ANYTHING = st.one_of(
    st.binary(),
    st.text().map(str.encode),
    st.lists(st.sampled_from(LINES) | SHORT, max_size=20).map(lambda lines: "\n".join(lines).encode()),
    st.dictionaries(st.sampled_from(keys()) | SHORT, PLAIN).map(lambda d: write(d).encode()),
    st.dictionaries(st.sampled_from(keys()), PLAIN, max_size=2).map(lambda d: (BASE + write(d)).encode()),
)


@given(ANYTHING)
@settings(PROPERTY, max_examples=200)
def test_anything_is_an_experiment_or_a_config_error(content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_bytes(content)
        with suppress(ConfigError):
            assert isinstance(load_experiment(file.name), Experiment)
