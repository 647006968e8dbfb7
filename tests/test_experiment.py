"""Experiments: what is right is read as it is meant, and the reference says what the code does."""

import re
import shlex
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from backends import available
from testbed.__main__ import main
from testbed.config.docs import README, rewrite
from testbed.config.experiment import Choice, Experiment, Workload
from testbed.config.load import keys, load_experiment
from testbed.config.yaml_source import Source
from tests.yaml_texts import BASE, EVERYTHING, error_of

ROOT = README.parent.parent


def test_everything_comes_back_from_yaml(load: Any) -> None:
    experiment = load(EVERYTHING)
    assert load(experiment.to_yaml()) == experiment
    assert {key for key in keys() if f"\n{key}:" in EVERYTHING} == set(keys())


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda file: file.stem)
@pytest.mark.parametrize("only", [[], ["vmap"]], ids=["all", "only vmap"])
def test_experiments_of_the_house_come_back_from_yaml(load: Any, file: Path, only: list[str]) -> None:
    resolved = load(load_experiment(file, only=only).to_yaml())
    names = available_in(file)
    assert [c.name for c in resolved.resolved_backends()] == [n for n in names if n in only or not only]
    assert load(resolved.to_yaml()) == resolved


def available_in(file: Path) -> list[str]:
    return [choice.name for choice in load_experiment(file).resolved_backends()]


@given(st.text())
@settings(deadline=None, derandomize=True, max_examples=50)  # a first run imports and is slow
def test_any_description_comes_back_from_yaml(description: str) -> None:
    problem = Workload(model=Choice.of("mlp"), data=Choice.of("random"), loss=Choice.of("nll"))
    experiment = Experiment(problems=(problem,), description=description)
    assert Source(experiment.to_yaml(), "text").data["description"] == description


def test_defaults_are_filled_in(load: Any) -> None:
    resolved = load(load(BASE).to_yaml())
    assert [c.name for c in resolved.backends] == available()
    assert resolved.baseline == "naive"


def test_baseline_that_is_not_run_is_none(load: Any) -> None:
    assert load(load(BASE + "backends: [vmap]").to_yaml()).resolved_baseline() is None


@pytest.mark.parametrize(("part", "name"), [("", "device"), ("timing", "rounds"), ("agreement", "name")])
def test_experiment_is_frozen(load: Any, part: str, name: str) -> None:
    experiment = load(BASE)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(getattr(experiment, part) if part else experiment, name, 3)


class TestReadme:
    """`experiments/README.md` says what the code does."""

    text = README.read_text(encoding="utf-8")

    def test_tables_are_those_of_the_code(self) -> None:
        assert rewrite(self.text) == self.text, "run: python -m testbed.config.docs"

    def test_tables_notice_a_change(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Workload.model_fields["batch_size"], "default", 65)
        assert "| `65` |" in rewrite(self.text)

    @pytest.mark.parametrize("yaml", re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    def test_examples_can_be_run(self, load: Any, yaml: str) -> None:
        assert load(yaml).chosen()

    @pytest.mark.parametrize("command", re.findall(r"^python -m testbed (experiments/.*)$", text, re.MULTILINE))
    def test_commands_can_be_run(self, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
        monkeypatch.chdir(ROOT)
        words = [sorted(glob(word)) if "*" in word else [word] for word in shlex.split(command)]  # as a shell does
        assert main([*chain(*words), "--dry-run"]) == 0

    def test_every_experiment_is_listed(self) -> None:
        listed = set(re.findall(r"\]\((\w+\.yaml)\)", self.text))
        assert listed == {file.name for file in README.parent.glob("*.yaml")}

    def test_example_of_an_error_is_one(self, load: Any) -> None:
        says = re.search(r"my\.yaml:(.*)", self.text)
        yaml = BASE + "batch_size: 8\nseed: 0\nbackends: [naive, vmpa]"
        assert says
        assert error_of(load, yaml).endswith(says[1])
