"""Backends are found by themselves: sibling files, entry points, plug-ins; and what is wrong with one is said."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from torch import nn

import backends
from backends import available, backend_class, get_backend, load_plugin, reference
from backends.base import QUANTITIES, Backend, GradsFn, LossFn, Unavailable, register
from backends.registry import BadOption, UnknownName
from testbed.__main__ import main
from testbed.problems import DATA, LOSSES, MODELS
from testbed.records import read_records

ROOT = Path(__file__).parent.parent


def test_the_built_in_backends_are_found() -> None:
    assert {"naive", "vmap", "opacus", "backpack"} <= set(available())


def test_a_first_call_that_names_a_backend_finds_it() -> None:
    """In a process of its own: nothing before it has run discovery."""
    code = (
        "import torch, testbed; m = torch.nn.Linear(3, 2); x = torch.ones(4, 3);"
        "print(testbed.compare(m, lambda o, t: o.sum(1), x, x, backends=['naive'], rounds=2).records[0].status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr


def test_there_is_one_reference() -> None:
    assert reference() == "naive"
    assert sum(backend_class(name).reference for name in available()) == 1


def test_native_is_what_a_backend_defines() -> None:
    assert all(backend_class(name).native("grads") for name in available())
    assert not any(Backend.native(quantity) for quantity in QUANTITIES)


@pytest.mark.parametrize("name", available())
def test_a_backend_in_use_says_of_itself_what_its_class_does(name: str) -> None:
    of, used = backend_class(name), get_backend(name)
    for quantity in QUANTITIES:
        assert (used.native(quantity), used.way(quantity)) == (of.native(quantity), of.way(quantity))
    with suppress(Unavailable):
        used.load()
    used.release()


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("vmpa", {}, "unknown backend 'vmpa' (did you mean 'vmap'?); available: "),
        (
            "vmap",
            {"chunk": 3},
            "backend 'vmap' has no option 'chunk' (did you mean 'chunk_size'?); options: randomness, chunk_size, ",
        ),
        ("vmap", {"chunk_size": 0}, "backend 'vmap', option 'chunk_size': should be greater than 0, found 0"),
        ("vmap", {"chunk_size": "3"}, "option 'chunk_size': should be a whole number, found '3'"),
        ("opacus", {"mode": "hook"}, "option 'mode': should be 'hooks', 'functorch' or 'ew', found 'hook'"),
        ("naive", {"mode": 1}, "backend 'naive' has no option 'mode'; options: chunk_size, "),
    ],
)
def test_a_wrong_name_or_option_says_what_is_allowed(name: str, options: dict[str, object], sentence: str) -> None:
    with pytest.raises((UnknownName, BadOption)) as error:
        get_backend(name, **options)
    assert sentence in str(error.value)


def backend_file(folder: Path, name: str = "mine", body: str = "", stem: str = "plugin") -> Path:
    file = folder / f"{stem}.py"
    file.write_text(f"""
from dataclasses import dataclass
from backends import get_backend
from backends.base import Backend, register
{body}
@register("{name}", requires={{"a_library_that_is_not_there": "no-such-thing"}} if "{name}" == "absent" else None)
@dataclass(frozen=True)
class Mine(Backend):
    def grads(self, model, loss_fn):
        return get_backend("vmap").grads(model, loss_fn)
""")
    return file


def test_a_plugin_file_adds_a_backend(tmp_path: Path) -> None:
    load_plugin(backend_file(tmp_path))
    assert "mine" in available()
    assert get_backend("mine").name == "mine"


def test_the_same_plugin_twice_is_no_conflict(tmp_path: Path) -> None:
    file = backend_file(tmp_path)
    load_plugin(file)
    load_plugin(file)


def test_two_backends_of_one_name_are_an_error_that_names_both(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two backends are named 'vmap': .*vmap\.py:Vmap and .*plugin\.py:Mine"):
        load_plugin(backend_file(tmp_path, name="vmap"))


def test_a_missing_library_is_unavailable_not_absent(tmp_path: Path) -> None:
    load_plugin(backend_file(tmp_path, name="absent"))
    assert "absent" in available()
    with pytest.raises(Unavailable, match="pip install no-such-thing"):
        backend_class("absent").load()


def test_an_import_error_of_a_plugins_own_escapes(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="not_there_either"):
        load_plugin(backend_file(tmp_path, body="import not_there_either"))


def test_an_entry_point_adds_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend_file(tmp_path, name="from_entry_point", stem="installed_backend")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = EntryPoint(name="x", value="installed_backend", group=backends.ENTRY_POINTS)
    monkeypatch.setattr(backends, "entry_points", lambda group: [entry] if group == backends.ENTRY_POINTS else [])
    backends._discover.cache_clear()
    assert "from_entry_point" in available()


def test_a_sibling_file_adds_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend_file(tmp_path, name="sibling", stem="a_new_sibling")
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    backends._discover.cache_clear()
    assert "sibling" in available()
    monkeypatch.delitem(sys.modules, "backends.a_new_sibling")


def plain_class(decorate: Callable[[type], type]) -> type:
    class Plain(Backend):
        def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
            raise AssertionError

    return decorate(Plain)


def test_a_backend_is_a_frozen_dataclass_of_backend() -> None:
    with pytest.raises(TypeError, match="must be a class derived from Backend, under @dataclass"):
        plain_class(register("plain"))
    with pytest.raises(TypeError, match="must be a class derived from Backend"):
        register("plain")(dataclass(frozen=True)(type("NoBackend", (), {})))  # type: ignore[type-var]


README = (ROOT / "backends" / "README.md").read_text(encoding="utf-8")


def test_the_readmes_example_runs_as_it_stands(tmp_path: Path) -> None:
    """The example is under 30 lines, agrees with the reference, and runs as a process with `--plugin`."""
    (example,) = re.findall(r"```python title=\"two_halves.py\"\n(.*?)```", README, flags=re.DOTALL)
    assert len(example.splitlines()) < 30
    (tmp_path / "two_halves.py").write_text(example)
    (tmp_path / "e.yaml").write_text(
        "model: logistic\ndata: {random: {shape: [4], classes: 3}}\nloss: nll\nbatch_size: 5\n"
        "backends: [naive, two_halves]\ntiming: {rounds: 2, max_s: 1}\n"
    )
    command = [sys.executable, "-m", "testbed", "e.yaml", "--plugin", "two_halves.py", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # the testbed need not be installed
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert {r.backend: r.status for r in read_records(tmp_path / "run" / "results.jsonl")} == {
        "naive": "ok",
        "two_halves": "ok",
    }


def test_a_plugin_registers_models_data_and_losses_too(tmp_path: Path) -> None:
    (tmp_path / "my_model.py").write_text("""
from __future__ import annotations
from typing import TYPE_CHECKING
import torch
from testbed import register_data, register_loss, register_model
from testbed.problems import Samples
if TYPE_CHECKING:
    from torch.nn import Module

@register_model("my_model")
def my_model(example: Samples, *, width: int = 4) -> Module:
    return torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, example.outputs))

@register_data("my_data")
def my_data(n):
    return Samples(torch.randn(n, 3), torch.randn(n, 2), 2)

@register_loss("my_loss")
def my_loss(outputs, targets):
    return (outputs - targets).abs().sum(1)
""")
    (tmp_path / "e.yaml").write_text(
        "model: {my_model: {width: 5}}\ndata: my_data\nloss: my_loss\nbatch_size: 4\n"
        "backends: [naive, vmap]\ntiming: {rounds: 2, max_s: 1}\n"
    )
    code = main([str(tmp_path / "e.yaml"), "--plugin", str(tmp_path / "my_model.py"), "--out", str(tmp_path / "run")])
    assert code == 0
    assert ("my_model" in MODELS, "my_data" in DATA, "my_loss" in LOSSES) == (True, True, True)
