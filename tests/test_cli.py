"""The command line: what it prints, what it leaves, and with which exit code it ends."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import testbed
import testbed.__main__ as command_line
import testbed.commands.run as run_command
from backends import available
from testbed.problems import DATA, LOSSES, MODELS, register_model
from testbed.records import read_records
from tests.command_line import PLUGIN, SMALL, message, plugin

ROOT = Path(__file__).parent.parent
FILLED = "return lambda x, y: {k: p.new_full((len(x), *p.shape), %s) for k, p in trainable(model).items()}"
ENDS = {
    "unsupported": ("raise Unsupported('not this')", 0),
    "unavailable": ("", 0),
    "disagrees": (FILLED % "0", 1),
    "nonfinite": (FILLED % "float('nan')", 1),
    "error": ("raise RuntimeError('boom')", 3),
    "oom": ("raise MemoryError('too much')", 3),
    "interrupted": ("raise KeyboardInterrupt", 130),
}  # the body of `grads` that gives a status, and the exit code of the run


def backend(folder: Path, status: str) -> Path:
    """Write a plug-in whose backend `mine` ends with a status."""
    requires = "{'no_such_library': 'no-such-library'}" if status == "unavailable" else "{}"
    return plugin(folder, PLUGIN.replace("{}", requires).replace("...", ENDS[status][0] or "..."))


class TestHelp:
    def test_help_has_examples(self, call: Any) -> None:
        code, out, _ = call("--help")
        assert code == 0
        assert "\nexamples:\n  python -m testbed experiments/mnist.yaml\n" in out
        assert "exit codes:" in out

    def test_version(self, call: Any) -> None:
        code, out, _ = call("--version")
        assert code == 0
        assert f"testbed {testbed.__version__} (torch {torch.__version__}, Python" in out

    def test_nothing_is_usage(self, call: Any) -> None:
        code, _, err = call()
        assert code == 2
        assert "usage: python -m testbed" in err

    @pytest.mark.parametrize("option", ["--plugn", "--device=gpu"])
    def test_unknown_option_is_usage(self, call: Any, small: Path, option: str) -> None:
        code, _, err = call(small, option)
        assert code == 2
        assert option.split("=")[-1] in err.splitlines()[-1]


KINDS = {"backends": available(), "models": MODELS, "data": DATA, "losses": LOSSES}


class TestList:
    @pytest.fixture(autouse=True)
    def _no_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("COLUMNS", raising=False)

    @pytest.mark.parametrize("kind", KINDS)
    def test_kind_lists_its_names(self, call: Any, kind: str) -> None:
        code, out, _ = call("list", kind)
        first, *lines = out.splitlines()
        assert (code, first) == (0, kind)
        names = [line.split()[0] for line in lines if not line.startswith("  (every")]
        assert names == sorted(KINDS[kind])

    def test_names_come_with_a_line_and_their_options(self, call: Any) -> None:
        out = call("list", "backends").out
        assert re.search(r"^  vmap +`vmap\(grad\(loss\)\)` over the batch. \(options: randomness\)$", out, re.M)

    @pytest.mark.parametrize("columns", [40, 60, 80])
    def test_fits_the_terminal(self, call: Any, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = call("list", "models").out
        monkeypatch.setenv("COLUMNS", str(columns))
        wrapped = call("list", "models").out
        assert max(map(len, wrapped.splitlines())) <= columns < max(map(len, plain.splitlines()))
        assert wrapped.split() == plain.split()

    def test_experiments(self, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)
        code, out, _ = call("list", "experiments")
        assert code == 0
        assert re.search(r"^  experiments/mnist.yaml +PyTorch's per-sample-gradient tutorial", out, re.M)

    def test_experiment_that_is_wrong_hides_no_other(self, call: Any, small: Path) -> None:
        (small.parent / "experiments").mkdir()
        (small.parent / "experiments" / "a.yaml").write_text("- 3", encoding="utf-8")
        small.rename("experiments/b.yaml")
        code, out, _ = call("list", "experiments")
        assert code == 0
        assert re.search(r"a.yaml +cannot be run: experiments/a.yaml:1:1: expected keys", out)
        assert re.search(r"b.yaml +A small one.", out)

    def test_everything(self, call: Any) -> None:
        code, out, _ = call("list")
        assert code == 0
        assert [line for line in out.splitlines() if not line.startswith(" ")] == [*KINDS, "experiments"]

    def test_plugin_is_listed(self, call: Any, tmp_path: Path) -> None:
        assert re.search("^  mine ", call("list", "backends", "--plugin", backend(tmp_path, "error")).out, re.M)

    def test_missing_library_is_said(self, call: Any, tmp_path: Path) -> None:
        out = call("list", "backends", "--plugin", backend(tmp_path, "unavailable")).out
        assert re.search("^  mine +unavailable: pip install no-such-library$", out, re.M)

    def test_typo_of_a_kind(self, call: Any) -> None:
        code, out, err = call("list", "backend")
        assert (code, out) == (2, "")
        assert "invalid choice: 'backend'" in err
        assert "losses" in err


class TestDryRun:
    def test_builds_no_model_and_writes_nothing(self, call: Any, small: Path) -> None:
        @register_model("never_made")
        def never_made(example: object) -> None:
            raise AssertionError("a dry run has made a model")

        code, out, err = call(small, "--dry-run", "--set", "model=never_made", "--out", "run")
        assert (code, err) == (0, "")
        assert "model: never_made" in out
        assert list(small.parent.iterdir()) == [small]

    def test_says_every_cell(self, call: Any, small: Path) -> None:
        out = call(
            small, "--dry-run", "--set", "quantities=[grads, norms]", "--set", "backends.1.vmap.chunk_size=2"
        ).out
        assert re.findall("^would run .*", out, re.M) == [
            f"would run {quantity} with {label} on cpu"
            for quantity in ("grads", "norms")
            for label in ("naive", "vmap(chunk_size=2)")
        ]

    def test_only(self, call: Any, small: Path) -> None:
        assert re.findall("with (.*) on", call(small, "--dry-run", "--only", "vmap").out) == ["vmap"]


class TestRun:
    def test_default_folder_is_named_after_experiment_and_time(self, call: Any, small: Path) -> None:
        assert call(small).code == 0
        (folder,) = (small.parent / "runs").iterdir()
        assert re.fullmatch(r"small-\d{8}-\d{6}", folder.name)

    @pytest.mark.parametrize("status", ENDS)
    def test_exit_code(self, call: Any, small: Path, status: str) -> None:
        file = backend(small.parent, status)
        code, out, err = call(small, "--plugin", file, "--set", "backends.1=mine", "--out", "run")
        (mine,) = (r for r in read_records(Path("run/results.jsonl")) if r.backend == "mine")
        assert (mine.status, code) == (status, ENDS[status][1])
        assert mine.reason in " ".join(out.split())
        assert "Traceback" not in out + err

    @pytest.mark.parametrize(
        ("status", "expect", "code"),
        [
            ("disagrees", "mine=disagrees", 0),
            ("error", "mine=error", 0),
            ("unsupported", "mine=ok", 1),
            ("disagrees", "mine=nonfinite", 1),
            ("unsupported", "naive=disagrees", 1),
            ("error", "naive=ok", 3),
        ],
    )
    def test_expect_sets_the_exit_code(self, call: Any, small: Path, status: str, expect: str, code: int) -> None:
        arguments = ("--plugin", backend(small.parent, status), "--set", "backends.1=mine", "--set", f"expect.{expect}")
        assert call(small, *arguments).code == code

    def test_traceback_of_a_cell_is_kept(self, call: Any, small: Path) -> None:
        call(small, "--plugin", backend(small.parent, "error"), "--set", "backends.1=mine", "--out", "run")
        log = Path("run/errors.log").read_text(encoding="utf-8")
        assert log.startswith("mine, grads\nTraceback")
        assert log.rstrip().endswith("RuntimeError: boom")

    def test_a_model_that_fails_is_a_failure_and_its_traceback_is_kept(self, call: Any, small: Path) -> None:
        @register_model("narrow")
        def narrow(example: object) -> torch.nn.Module:
            return torch.nn.Linear(4, 3)  # the inputs have five numbers

        code, out, _ = call(small, "--set", "model=narrow", "--out", "run")
        assert code == 3
        assert [r.status for r in read_records(Path("run/results.jsonl"))] == ["error", "error"]
        assert "\ntracebacks in run/errors.log\n" in out
        log = Path("run/errors.log").read_text(encoding="utf-8")
        assert log.count("mat1 and mat2 shapes cannot be multiplied") == 2

    def test_fault_of_the_program_is_no_disagreement(
        self, call: Any, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError("our own")

        monkeypatch.setattr(run_command, "run_experiment", fail)
        code, _, err = call(small)
        assert code == 3
        assert err.endswith("ZeroDivisionError: our own\n")

    def test_terminal_without_the_characters_gets_their_codes(
        self, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", out)
        assert command_line.main([str(small), "--dry-run", "--set", "description=3×3"]) == 0
        assert b"description: 3\\xd73" in out.buffer.getvalue()  # type: ignore[attr-defined]


class TestSeveral:
    """Several experiments in one command."""

    @pytest.fixture
    def two(self, small: Path) -> list[Path]:
        (small.parent / "other.yaml").write_text(SMALL, encoding="utf-8")
        return [small, small.parent / "other.yaml"]

    def test_each_has_a_folder_of_its_own(self, two: list[Path], call: Any) -> None:
        ended = call(*two, "--out", "runs/two")
        assert (ended.code, ended.out.count("experiment 1 of 2\nsmall: A small one.")) == (0, 1)
        assert "\n\nexperiment 2 of 2\nother: A small one." in ended.out
        for name in ("small", "other"):
            records = read_records(two[0].parent / f"runs/two/{name}/results.jsonl")
            assert [r.experiment for r in records] == [name, name]

    def test_a_mistake_in_one_costs_no_run(self, two: list[Path], call: Any) -> None:
        two[1].write_text(SMALL + "model: x\n", encoding="utf-8")
        ended = call(*two, "--out", "runs/two")
        assert ended.code == 2
        assert message(ended).startswith(f"{two[1]}:10:1: duplicate key 'model'")
        assert not (two[0].parent / "runs").exists()

    def test_one_that_cannot_be_made_costs_the_others_nothing(self, two: list[Path], call: Any) -> None:
        two[0].write_text(SMALL.replace("logistic", "{transformer: {width: 5, heads: 2}}"), encoding="utf-8")
        ended = call(*two)
        assert ended.code == 2
        assert "testbed: error: small: " in ended.err
        assert "records in runs/other-" in ended.out

    def test_the_exit_code_is_the_worst_ones(self, two: list[Path], call: Any) -> None:
        two[0].write_text(SMALL + "expect: {vmap: disagrees}\n", encoding="utf-8")
        assert call(*two).code == 1

    def test_one_name_for_two_is_a_mistake(self, two: list[Path], call: Any) -> None:
        assert message(call(two[0], two[0])).startswith(f"{two[0]}: 'small' is the name of {two[0]} too")

    def test_resuming_is_for_one(self, two: list[Path], call: Any) -> None:
        assert "--resume DIR goes on with one run; found 2 experiments" in call(*two, "--resume", "runs/x").err


@pytest.mark.parametrize("command", [["precision", "experiments/digits.yaml"], ["calibrate", "--seeds", "1"]])
def test_a_folder_that_cannot_be_made_is_said_before_anything_is_measured(
    command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert command_line.main([*command, "--out", str(tmp_path / "file" / "folder")]) == 2
    assert capfd.readouterr() == (
        "",
        f"testbed: error: --out {tmp_path}/file/folder: cannot be made: Not a directory\n",
    )
