"""What every test shares: one thread's worth of determinism, and a truth for each case that is computed once."""

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends import available, get_backend, reference
from backends.base import BACKENDS, Unsupported
from testbed import timing
from testbed.config.experiment import Experiment
from testbed.config.load import load_experiment
from testbed.problems import DATA, LOSSES, MODELS
from tests.cases import Case, cases
from tests.command_line import SMALL, Ended, run_here
from tests.precisions import tf32

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would ours


@pytest.fixture(scope="module", autouse=True)
def _spared_by_the_collector() -> None:
    """Let the garbage collector pass over what stays, such as libraries: else a measured peak costs half a second."""
    given(st.none())(lambda _: None)()  # Hypothesis looks once for who holds random generators, and freezing hides them
    gc.collect()
    gc.freeze()


@cache
def truth(name: str, quantity: str) -> Any:
    """Return what the reference computes for a case."""
    case = next(c for c in cases() if c.name == name)
    return getattr(get_backend(reference()), quantity)(case.model, case.loss_fn)(case.inputs, case.targets)


@pytest.fixture
def run() -> Callable[..., Any]:
    """Return a function that runs a backend on a case; a refusal that the case or the backend allows skips the test.

    A native way to another quantity may know less than that to the gradients.
    """

    def run_case(backend: Any, case: Case, quantity: str = "grads", **options: Any) -> Any:
        if quantity not in backend.quantities:
            pytest.skip(f"computes {', '.join(backend.quantities)} only")
        try:
            fn = getattr(backend, quantity)(case.model, case.loss_fn, **options)
            return fn(case.inputs, case.targets)
        except Unsupported as refusal:
            if not (case.may_refuse or quantity != "grads" or getattr(backend, "narrow", False)):
                raise
            pytest.skip(f"refuses: {refusal}")

    return run_case


@contextmanager
def kept_registries() -> Iterator[None]:
    """Forget at the end what plug-ins have registered meanwhile."""
    available()  # discovery fills the registry
    registries = (BACKENDS, MODELS, DATA, LOSSES)
    before = [dict(registry._entries) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry._entries.clear()
        registry._entries.update(entries)


@pytest.fixture(autouse=True)
def _kept_registries() -> Iterator[None]:
    with kept_registries():
        yield


@pytest.fixture(autouse=True)
def _untouched_random_state() -> Any:
    """Fail the test whose code leaves the global random state changed: nothing here may."""
    before = torch.get_rng_state()
    yield
    changed = not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)
    assert not changed, "the global random state was changed"


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure ceilings on matrices that take no time, but in processes of their own: half a second a run."""
    measure = timing.ceilings
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype, size=512: measure(device, dtype, size))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs in this process draw no page: a second each, and what is drawn has tests of its own."""
    monkeypatch.setattr("testbed.commands.run.draw_page", lambda records, folder: None)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Experiment]:
    """Return a function that loads a YAML text, with the arguments of `load_experiment` after it."""

    def load_text(text: str, *arguments: Any) -> Experiment:
        (tmp_path / "e.yaml").write_text(text, encoding="utf-8")
        return load_experiment(tmp_path / "e.yaml", *arguments)

    return load_text


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], undrawn: None) -> Callable[..., Ended]:
    """Return a function that runs a command line in this process."""
    return lambda *arguments: run_here(arguments, capsys)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a small experiment in an empty folder, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL, encoding="utf-8")
    return tmp_path / "small.yaml"


@pytest.fixture
def own_random_state() -> Iterator[None]:
    """Let a test draw from the global random state: from seed 0, and from a state of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """Let nothing be rounded to TF32."""
    with tf32(False):
        yield
