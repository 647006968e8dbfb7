"""The check's own error rates on a few problems: no false alarm, and planted errors are caught."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from backends import get_backend, variants
from backends.base import Backend, GradsFn, LossFn, Named, register
from testbed.__main__ import main
from testbed.calibrate import PLANTED, Tally, calibrate
from testbed.precision import cancellation, measure
from testbed.problems import make_problem
from testbed.records import EXIT_FAILED, EXIT_OK, EXIT_WRONG
from testbed.samples import choose
from testbed.truth import FEW

CAUGHT = {"float64": 1e-8, "float32": 1e-4, "bfloat16": 0.11}  # what must be caught at the latest


@pytest.fixture(scope="module")
def tallies() -> list[Tally]:
    with torch.device("meta"):  # it does not matter what the default device is
        return calibrate([0], list(CAUGHT), ["mlp", "group norm", "transformer"], train_steps=5)


def test_there_is_no_false_alarm(tallies: list[Tally]) -> None:
    assert [t.blamed for t in tallies] == [[]] * len(tallies)
    assert all(t.runs >= 3 * 3 for t in tallies)


def test_planted_errors_are_caught(tallies: list[Tally]) -> None:
    for t in tallies:
        assert set(t.caught) == set(PLANTED)
        assert all(max(smallest) <= CAUGHT[t.dtype] for smallest in t.caught.values()), (t.dtype, t.caught)


def test_a_smaller_factor_would_cry_wolf(tallies: list[Tally]) -> None:
    """The measurement can fail: at half the default factor there are alarms."""
    assert sum(t.alarms[2.0, 0] for t in tallies) > 0


def test_command_prints_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["calibrate", "--seeds", "1", "--model", "mlp", "--dtype", "float32", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert code == 0
    assert "0 of" in printed
    assert {p.name for p in tmp_path.glob("c*")} == {"calibration.json", "calibration.png", "calibration.svg"}
    assert json.loads((tmp_path / "calibration.json").read_text())[0]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["calibrate", "--model", "mpl"], "unknown model 'mpl' (did you mean 'mlp'?); available:"),
        (["calibrate", "--dtype", "float8"], "unknown dtype 'float8'"),
        (["calibrate", "--seeds", "0"], "--seeds: should be at least 1, found 0"),
        (["precision", "experiments/mnist.yaml", "--dtype", "float8"], "--dtype: unknown dtype 'float8'"),
        (["precision", "experiments/mnits.yaml"], "no such file"),
    ],
)
def test_a_typo_is_one_line(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in line


def test_precision_has_an_error_for_each_sample() -> None:
    problem = make_problem("mlp", "random", "nll", batch_size=5)
    found = measure(problem, ["float32", "float64"])
    assert len(found) == 2 * len(variants("grads"))
    assert {(e.status, len(e.relative), len(e.samples)) for e in found} <= {("ok", 5, 5), ("unsupported", 0, 0)}
    exact = max(max(e.relative) for e in found if e.dtype == "float64")
    coarse = min(max(e.relative) for e in found if e.dtype == "float32")
    assert exact < 1e-12 < coarse < 1e-4


def test_precision_names_the_samples_it_has_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.truth.BUDGET", 0)
    problem = make_problem("mlp", "random", "nll", batch_size=3 * FEW)
    (found,) = measure(problem, ["float32"], [("naive", {})])
    index = choose(problem.n, FEW)
    assert index is not None
    assert found.samples == tuple(index.tolist())
    assert len(found.relative) == FEW


def fails(error: Exception) -> Named:
    raise error


ENDINGS: dict[str, tuple[Callable[[Named], Named], str, str, int]] = {
    "a form that cannot be compared": (lambda g: {}, "disagrees", "2 of 2 parameters are missing", EXIT_WRONG),
    "NaN": (lambda g: {k: t / 0 for k, t in g.items()}, "nonfinite", "nonfinite numbers", EXIT_WRONG),
    "no memory": (lambda g: fails(MemoryError("no room")), "oom", "no room", EXIT_FAILED),
    "an error without words": (lambda g: fails(RuntimeError()), "unsupported", "RuntimeError", EXIT_OK),
    "a mistake in a backend": (lambda g: fails(KeyError("x")), "error", "KeyError: 'x'", EXIT_FAILED),
}


@pytest.mark.parametrize(("makes", "status", "reason", "code"), ENDINGS.values(), ids=ENDINGS)
def test_precision_says_what_became_of_a_backend(
    makes: Callable[[Named], Named], status: str, reason: str, code: int, tmp_path: Path, capsys: Any
) -> None:
    @register("planted")
    @dataclass(frozen=True)
    class Planted(Backend):
        def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
            plain = get_backend("naive").grads(model, loss_fn)
            return lambda inputs, targets: makes(plain(inputs, targets))

    experiment = tmp_path / "e.yaml"
    experiment.write_text("model: logistic\ndata: {random: {shape: [4], classes: 3}}\nloss: nll\nbatch_size: 4\n")
    chosen = ["--set", "backends=[naive, planted]", "--dtype", "float32", "--out", str(tmp_path / "run")]
    assert main(["precision", str(experiment), *chosen]) == code
    assert f"planted in float32: {status}: {reason}" in " ".join(capsys.readouterr().out.split())


def test_precision_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = tmp_path / "e.yaml"
    experiment.write_text("model: logistic\ndata: {random: {shape: [4], classes: 3}}\nloss: nll\nbatch_size: 4\n")
    assert main(["precision", str(experiment), "--dtype", "float32", "--out", str(tmp_path / "run")]) == 0
    assert "Norms by Gram" in capsys.readouterr().out
    assert (tmp_path / "run" / "precision.png").stat().st_size > 1000


def test_precision_says_why_a_backend_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = tmp_path / "e.yaml"
    experiment.write_text("model: transformer\ndata: {tokens: {length: 3}}\nloss: nll\nbatch_size: 2\n")
    chosen = ["--set", "backends=[backpack]", "--dtype", "float32", "--out", str(tmp_path / "run")]
    assert main(["precision", str(experiment), *chosen]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "backpack in float32: unsupported: parameter `blocks.0.norm1.weight`: BackPACK computes no" in said


@pytest.mark.parametrize(("command", "file"), [("calibrate", "calibration.json"), ("precision", "precision.json")])
def test_what_a_folder_holds_is_not_overwritten(
    command: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / file).write_text("[1]")
    experiment = ["experiments/digits.yaml"] if command == "precision" else []
    assert main([command, *experiment, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr() == ("", f"testbed: error: --out {tmp_path}: holds a run already; give another folder\n")
    assert (tmp_path / file).read_text() == "[1]"


def test_norms_by_gram_cancel_where_direct_ones_do_not() -> None:
    with torch.device("meta"):
        coarse = cancellation(torch.bfloat16)
    assert coarse.negative > 0, "a squared norm below zero: clamped, it would mean unclipped"
    assert coarse.direct < 0.02 < 1 < coarse.gram
    assert cancellation(torch.float32).gram > 10 * cancellation(torch.float32).direct


@pytest.mark.parametrize(
    ("arguments", "what", "file"),
    [
        (
            ["calibrate", "--seeds", "2", "--model", "mlp", "--dtype", "float32"],
            "calibrate._measure",
            "calibration.json",
        ),
        (["precision", "experiments/digits.yaml", "--set", "batch_size=3"], "precision._errors", "precision.json"),
    ],
)
def test_an_interruption_keeps_what_was_measured(
    arguments: list[str],
    what: str,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = importlib.import_module(f"testbed.{what.split('.')[0]}")
    measure, calls = getattr(module, what.split(".")[1]), list[int]()

    def once(*of: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(*of)

    monkeypatch.setattr(f"testbed.{what}", once)
    assert main([*arguments, "--out", str(tmp_path)]) == 130
    printed = capsys.readouterr()
    assert f"data and picture in {tmp_path}" in printed.out
    assert printed.err.endswith("testbed: interrupted\n")
    assert json.loads((tmp_path / file).read_text())
