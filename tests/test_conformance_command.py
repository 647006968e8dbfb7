"""`python -m testbed conformance`: what it prints, writes and returns."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from testbed.__main__ import main
from testbed.conformance.capabilities import BEGIN, END
from testbed.conformance.sweep import _Bench, choose_cases, choose_cells
from testbed.records import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, EXIT_WRONG, read_records
from tests.conftest import kept_registries

PLANTED = str(Path(__file__).parent / "planted.py")
FAILING = """
from dataclasses import dataclass
from backends.base import Backend, register

@register("failing")
@dataclass(frozen=True)
class Failing(Backend):
    def grads(self, model, loss_fn):
        raise RuntimeError("out of ideas")

@register("meddling")
@dataclass(frozen=True)
class Meddling(Backend):
    float64 = False
    def grads(self, model, loss_fn):
        return lambda inputs, targets: {}
"""


class Run:
    """The command, run once: its exit code, output and records."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> None:
        with kept_registries():
            self.code = main(["conformance", *arguments, "--out", str(folder)])
        self.out, self.err = capsys.readouterr()
        results = folder / "results.jsonl"
        self.records = read_records(results) if results.exists() else []

    @property
    def statuses(self) -> set[str]:
        return {r.status for r in self.records}


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    return lambda *arguments: Run(capsys, tmp_path / "run", *arguments)


def test_matrix_counts_and_records(command: Any, tmp_path: Path) -> None:
    done = command("--layer", "PReLU", "--backend", "naive,vmap")
    assert done.code == EXIT_OK
    assert re.search(r"^PReLU +12 +12$", done.out, re.MULTILINE)
    assert "vmap stands for vmap(randomness=same), vmap(randomness=different) too" in done.out.replace("\n", " ")
    assert re.search(r"^naive +12 +0 +0 +0 +0 +0 +0$", done.out, re.MULTILINE)
    assert "grads: 12 cases × 4 backends" in done.err
    assert len(done.records) == 48
    record = next(r for r in done.records if r.problem["case"] == "PReLU called twice")
    assert (record.experiment, record.quantity, record.status) == ("conformance", "grads", "ok")
    assert (record.problem["layer"], record.problem["option"]) == ("PReLU", "called twice")
    assert (tmp_path / "run" / "environment.json").exists()
    assert len({r.cell for r in done.records}) == 48


@pytest.mark.parametrize("quantity", ["grads", "norms", "clipped_sum", "variance", "gram"])
def test_a_wrong_backend_ends_with_exit_1_and_is_explained(command: Any, quantity: str) -> None:
    arguments = ("--plugin", PLANTED, "--backend", "planted_averaged", "--layer", "Linear", "--quantity", quantity)
    done = command(*arguments)
    assert done.code == EXIT_WRONG
    assert done.statuses == {"disagrees"}
    assert "16 wrong!" in done.out
    assert "wrong: planted_averaged," in done.out
    if quantity == "grads":
        assert "every gradient is 1/4 of the truth" in done.out.replace("\n    ", " ")


def test_a_failing_backend_ends_with_exit_3_and_the_place(command: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FAILING)
    done = command("--plugin", str(tmp_path / "mine.py"), "--backend", "failing", "--layer", "GRUCell")
    assert done.code == EXIT_FAILED
    assert "5 error" in done.out
    assert "RuntimeError: out of ideas (mine.py:9, in grads)" in done.out.replace("\n    ", " ")
    assert "out of ideas" in (tmp_path / "run" / "errors.log").read_text()


def test_a_backend_without_float64_is_refused_there(command: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FAILING)
    done = command("--plugin", str(tmp_path / "mine.py"), "--backend", "meddling", "--layer", "GRUCell")
    assert done.code == EXIT_OK
    assert {r.reason for r in done.records} == {"`model`: this backend has no float64 path, in which the matrix is"}


def test_a_backend_that_changes_the_caller_s_model_is_wrong(command: Any) -> None:
    done = command("--plugin", PLANTED, "--backend", "planted_mutating", "--layer", "PReLU")
    assert done.code == EXIT_WRONG
    assert {r.diagnosis for r in done.records} == {
        "the backend changed the caller's model: the values of `before.0.weight`"
    }


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("mode: Dropout in training", "the problem: `a.1` (Dropout) is random"),
        ("batch: divided by its size", "the problem: the model or its loss depends on how many samples are in a batch"),
        ("BatchNorm2d in training mode", "the problem: `layer` (BatchNorm2d) in training mode mixes the samples"),
        ("Embedding(max_norm=0.5)", "the problem: `layer` (Embedding(max_norm=0.5)) changes its weights"),
    ],
)
def test_where_the_problem_has_no_gradient_nobody_is_wrong(command: Any, case: str, reason: str) -> None:
    done = command("--plugin", PLANTED, "--layer", case, "--verbose")
    assert done.code == EXIT_OK
    assert done.statuses == {"unsupported"}
    assert all(r.reason.startswith(reason) for r in done.records)
    assert f"refused: naive, grads: {case}" in done.out


def test_unguarded_shows_what_the_library_returns(command: Any) -> None:
    pytest.importorskip("opacus")
    done = command("--layer", "Conv2d(padding_mode='reflect')", "--backend", "opacus(mode=functorch)", "--unguarded")
    assert done.code == EXIT_OK
    assert {r.experiment for r in done.records} == {"conformance, unguarded"}


def test_unguarded_wrong_cells_end_with_exit_1(command: Any) -> None:
    pytest.importorskip("opacus")
    done = command("--layer", "Embedding(padding_idx=0)", "--backend", "opacus", "--unguarded")
    assert done.code == EXIT_WRONG
    assert [r.status for r in done.records] == ["disagrees", "ok", "disagrees"]  # hooks, functorch, ew


def test_refusals_say_what_the_library_would_have_returned(command: Any) -> None:
    pytest.importorskip("opacus")
    done = command("--layer", "Embedding(padding_idx=0)", "--backend", "opacus", "--verbose")
    assert done.code == EXIT_OK
    assert [r.agreement.get("unguarded", {}).get("status") for r in done.records] == ["disagrees", None, "disagrees"]
    assert "[unguarded: only `layer.weight`" in re.sub(r"\s+", " ", done.out)


def test_all_quantities_are_one_line_where_they_are_alike(command: Any) -> None:
    done = command("--layer", "RNNCell", "--backend", "naive", "--quantity", "all")
    assert done.code == EXIT_OK
    assert {r.quantity for r in done.records} >= {"grads", "norms", "variance", "gram"}
    assert "variance: as grads, cell by cell" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "vmpa"), "unknown backend 'vmpa' (did you mean 'vmap'?); available: "),
        (("--layer", "Conv2"), "unknown layer 'Conv2' (did you mean 'Conv2d'?); available: "),
        (("--quantity", "norm"), "unknown quantity 'norm' (did you mean 'norms'?); available: "),
        (("--plugin", "nowhere.py"), "nowhere.py: FileNotFoundError: no plugin file nowhere.py"),
        (("--write-table", "nowhere.md"), "--write-table nowhere.md: cannot be read"),
        (("--write-table", PLANTED, "--layer", "Linear"), "leave out --layer"),
        (("--write-table", PLANTED, "--device", "auto"), "leave out --device"),
        pytest.param(
            ("--device", "cuda"),
            "device 'cuda': PyTorch finds no CUDA device here; use device 'cpu' or 'auto'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_usage_errors_are_one_line_and_run_nothing(command: Any, arguments: Sequence[str], message: str) -> None:
    done = command(*arguments)
    assert done.code == EXIT_USAGE
    assert message in done.err
    assert done.err.count("\n") == 1
    assert done.records == []


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END} {BEGIN}"])
def test_a_table_has_its_place_before_anything_runs(command: Any, text: str, tmp_path: Path) -> None:
    (tmp_path / "table.md").write_text(text, encoding="utf-8")
    done = command("--write-table", str(tmp_path / "table.md"))
    assert done.code == EXIT_USAGE
    assert done.err.endswith("table.md: it has no <!-- capabilities --> … <!-- /capabilities --> to write between\n")
    assert done.records == []


def test_ctrl_c_keeps_what_has_ended(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record, left = _Bench.record, [5]

    def interrupted(self: _Bench, cell: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return record(self, cell)

    monkeypatch.setattr(_Bench, "record", interrupted)
    threads = torch.get_num_threads()
    done = command("--layer", "Linear", "--backend", "naive")
    assert done.code == EXIT_INTERRUPTED
    assert len(done.records) == 5
    assert "interrupted; what was run is in" in done.out
    assert torch.get_num_threads() == threads


def test_cells_are_chosen_by_backend_and_by_variant() -> None:
    assert [c.label for c in choose_cells(["vmap(randomness=same)", "naive"])] == ["naive", "vmap(randomness=same)"]
    assert len(choose_cells(["vmap"], ["grads", "norms"])) == 6


def test_cases_are_chosen_by_row_layer_and_name() -> None:
    assert {c.layer for c in choose_cases("conv?D")} == {"Conv1d", "Conv2d", "Conv3d"}
    assert {c.name.partition(":")[0] for c in choose_cases("model, t*")} == {"tied"}
    assert [c.name for c in choose_cases("tied: a module called twice")] == ["tied: a module called twice"]
    assert len(choose_cases("model")) > 100
