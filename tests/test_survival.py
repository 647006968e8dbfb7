"""However a run ends, what it has finished is on disk, nothing of it is left running, and it can be resumed."""

import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testbed.__main__ import main
from testbed.config.yaml_source import ConfigError
from testbed.processes.shield import shielded, stoppable
from testbed.processes.store import TemporaryStore
from testbed.records import CannotWrite, Record, RecordFile, read_records
from testbed.run_folder import RunFolder
from tests.conftest import kept_registries
from tests.processes import LONG, SMALL, family, gone, records, start, wait_for

linux = pytest.mark.skipif(sys.platform != "linux", reason="signals and /dev/full are Linux'")
SLOW = f"""{SMALL}
quantities: [norms, grads]
timing: {{rounds: 4, max_s: 60, warmup: 0, precision: 0}}
backends: [naive, slow]
"""  # `grads` takes long enough to be met while it is timed; `norms` has its records by then
QUICK = f"""{SMALL}
quantities: [norms, grads]
timing: {{rounds: 2, max_s: 1}}
backends: [naive, vmap, mine]
"""
MINE = """
from dataclasses import dataclass
from backends import get_backend
from backends.base import Backend, register

@register("mine")
@dataclass(frozen=True)
class Mine(Backend):
    def grads(self, model, loss_fn):
        return get_backend("vmap").grads(model, loss_fn)
"""


def stopped(folder: Path, stop: Callable[[Any], None]) -> Any:
    """Run the slow experiment and stop it while `grads` is timed; return how it ended and what it leaves running."""
    (folder / "e.yaml").write_text(SLOW, encoding="utf-8")
    with start(folder / "e.yaml", "--out", folder / "run", TMPDIR=str(folder)) as process:
        wait_for(process, "grads: timing")
        with pytest.raises(ConfigError, match=r"--resume .*: another run is writing there"):
            RunFolder.resume(folder / "run")
        left = family(process)
        stop(process)
        out, err = process.communicate()
    return process.returncode, out, err, left


@linux
@pytest.mark.parametrize(
    "stop",
    [signal.SIGINT, signal.SIGTERM],
    ids=["Ctrl-C in a terminal", "SIGTERM"],
)
def test_a_run_that_is_stopped_ends_its_children_and_keeps_its_records(tmp_path: Path, stop: signal.Signals) -> None:
    """The signal meets all of its process group, as from a terminal or from `timeout`, and what forks children too."""
    code, out, err, left = stopped(tmp_path, lambda process: os.killpg(process.pid, stop))
    assert (code, err) == (130, "")
    assert f"interrupted; what was measured is in {tmp_path / 'run'}\n" in out
    assert len(left) >= 3
    assert gone(left)
    assert list(tmp_path.glob("testbed-*")) == []
    assert {(r.quantity, r.status) for r in records(tmp_path / "run")} == {("norms", "ok"), ("grads", "interrupted")}


@linux
def test_a_run_that_is_killed_is_resumed_where_it_was(tmp_path: Path) -> None:
    code, _, _, left = stopped(tmp_path, lambda process: process.kill())
    assert code == -signal.SIGKILL
    assert gone(left)
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    assert [(r.label, r.quantity, r.status) for r in records(tmp_path / "run")] == [
        ("naive", "norms", "ok"),
        ("slow", "norms", "ok"),
    ]
    with (tmp_path / "run" / "results.jsonl").open("a") as file:
        file.write('{"cell": "half a li')  # the power went off
    assert len(list(tmp_path.glob("testbed-*"))) == 1, "nobody could remove it"

    with start("--resume", tmp_path / "run", TMPDIR=str(tmp_path)) as process:
        out, _ = process.communicate()
    after = (tmp_path / "run" / "results.jsonl").read_bytes()
    assert process.returncode == 0
    assert "resumed: 2 of 4 cells have their record" in out
    assert after.startswith(before)
    new = [json.loads(line) for line in after.removeprefix(before).splitlines()]
    assert [(r["backend"], r["quantity"], r["status"]) for r in new] == [
        ("naive", "grads", "ok"),
        ("slow", "grads", "ok"),
    ]
    assert list(tmp_path.glob("testbed-*")) == []


def run(folder: Path, *arguments: str) -> int:
    """Run or resume the quick experiment in this process."""
    with kept_registries():
        return main([*arguments, "--plugin", str(folder / "mine.py"), "--in-process"])


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the quick experiment, its plug-in, and a run of it."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "e.yaml").write_text(QUICK, encoding="utf-8")
    (folder / "mine.py").write_text(MINE, encoding="utf-8")
    assert run(folder, str(folder / "e.yaml"), "--out", str(folder / "run")) == 0
    return folder


@pytest.fixture
def quick(ran: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder, to be spoilt."""
    return shutil.copytree(ran, tmp_path / "quick")


def again(folder: Path, *arguments: str) -> list[tuple[str, str]]:
    """Resume; return what was run."""
    before = {r.cell for r in records(folder / "run")}
    lines = (folder / "run" / "results.jsonl").read_text().splitlines()
    run(folder, "--resume", str(folder / "run"), *arguments)
    new = [r for line, r in zip_lines(folder) if line not in lines or r.cell not in before]
    return [(r.label, r.quantity) for r in new]


def zip_lines(folder: Path) -> list[tuple[str, Record]]:
    file = folder / "run" / "results.jsonl"
    return list(zip(file.read_text().splitlines(), read_records(file), strict=True))


def edit(folder: Path, change: Callable[[Record], Record | None]) -> None:
    """Change the records of a run; None removes one."""
    changed = [new for r in records(folder / "run") if (new := change(r))]
    text = "".join(r.to_json() + "\n" for r in changed)
    (folder / "run" / "results.jsonl").write_text(text, encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
class TestResume:
    """`--resume DIR` runs exactly what is missing."""

    def test_nothing_is_missing(self, quick: Path) -> None:
        assert again(quick) == []

    def test_a_missing_cell_is_run_and_compared_with_the_baseline(self, quick: Path) -> None:
        edit(quick, lambda r: r if (r.label, r.quantity) != ("vmap", "grads") else None)
        assert again(quick) == [("vmap", "grads")]
        assert records(quick / "run")[-1].timing["ratio"] is not None

    def test_an_interrupted_cell_is_missing(self, quick: Path) -> None:
        edit(quick, lambda r: dataclasses.replace(r, status="interrupted") if r.quantity == "norms" else r)
        assert sorted(again(quick)) == [("mine", "norms"), ("naive", "norms"), ("vmap", "norms")]

    def test_a_backend_whose_code_changed_is_run_again(self, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (quick / "mine.py").write_text(MINE + "\n# changed\n", encoding="utf-8")
        assert again(quick) == [("mine", "norms"), ("mine", "grads")]
        assert [r.label for r in read_records(quick / "run" / "superseded.jsonl")] == ["mine", "mine"]
        told = "resumed: 4 of 6 cells have their record; 2 other records went to superseded.jsonl\n"
        assert told in capsys.readouterr().out

    @pytest.mark.parametrize("what", ["source", "machine", "processor", "threads", "commit"])
    def test_other_code_or_another_machine_runs_everything_again(
        self, quick: Path, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from testbed import settings

        here = settings.environment
        monkeypatch.setattr(settings, "environment", lambda device: {**here(device), what: "other"})
        assert len(again(quick)) == 6

    def test_another_configuration_runs_everything_again(self, quick: Path) -> None:
        assert len(again(quick, "--set", "batch_size=5")) == 6

    def test_a_failed_cell_is_retried_when_asked(self, quick: Path) -> None:
        edit(quick, lambda r: dataclasses.replace(r, status="error") if r.label == "mine" else r)
        assert again(quick) == []
        assert again(quick, "--retry-failed") == [("mine", "norms"), ("mine", "grads")]

    def test_what_failed_for_a_limit_is_run_again_under_another(self, quick: Path) -> None:
        limits = {"timeout_s": 600.0, "memory_gb": None}

        def failed(r: Record) -> Record:
            about = {**r.environment, "limits": limits}
            return dataclasses.replace(r, status="timeout", environment=about) if r.label == "mine" else r

        edit(quick, failed)
        assert again(quick) == []
        assert again(quick, "--set", "limits.timeout_s=7") == [("mine", "norms"), ("mine", "grads")]

    def test_a_folder_without_a_run(self, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(quick, "--resume", str(quick)) == 2
        assert "no such file" in capsys.readouterr().err

    def test_a_plugin_that_is_left_out(self, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with kept_registries():
            assert main(["--resume", str(quick / "run")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "unknown backend 'mine'; available: " in line
        assert line.endswith("; what was run with --plugin FILE is resumed with it")

    @pytest.mark.parametrize("arguments", [[], ["--resume", "x", "--out", "y"], ["e.yaml", "--retry-failed"]])
    def test_usage(self, quick: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            run(quick, *arguments)
        assert "--resume" in capsys.readouterr().err.splitlines()[-1]

    def test_a_line_that_is_no_record(self, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (quick / "run" / "results.jsonl").write_text("{}\n", encoding="utf-8")
        assert run(quick, "--resume", str(quick / "run")) == 2
        assert capsys.readouterr().err.endswith(f"--resume {quick / 'run'}: results.jsonl: line 1 is no record\n")


@linux
class TestFullDisk:
    """A disk that is full is said in one line, and spoils nothing."""

    def test_run(self, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (quick / "full").mkdir()
        (quick / "full" / "results.jsonl").symlink_to("/dev/full")
        capsys.readouterr()
        assert run(quick, str(quick / "e.yaml"), "--out", str(quick / "full")) == 3
        (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
        assert "results.jsonl: cannot be written: No space left on device; the records before it are whole" in line

    def test_half_a_record_is_taken_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = RecordFile(tmp_path / "results.jsonl")
        record = Record("0", "e", {}, "b", {}, "grads", "ok", "", {}, "", {}, {}, {}, {})
        file.append(record)
        before = file.path.read_bytes()

        def full(number: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CannotWrite):
            file.append(record)
        assert file.path.read_bytes() == before


def test_a_signal_waits_until_a_record_is_written() -> None:
    done = []

    def write() -> None:
        with stoppable(), shielded():
            signal.raise_signal(signal.SIGTERM)
            done.append("written")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert done == ["written"]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no thread is sent a signal here")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_in_a_finalizer_is_heard_after_it(sent: signal.Signals) -> None:
    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(sent)  # Python ignores what this raises

    def finalize() -> None:
        with stoppable():
            Finalized()
            time.sleep(LONG)

    with pytest.raises(KeyboardInterrupt):
        finalize()


def test_an_interrupt_before_the_first_record_is_no_failure(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("testbed.commands.run.run_experiment", interrupted)
    assert run(quick, str(quick / "e.yaml"), "--out", str(quick / "early")) == 130
    assert capsys.readouterr().err.endswith("testbed: interrupted\n")


def test_a_store_that_was_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "testbed-left").mkdir()
    (tmp_path / "testbed-left" / "lock").touch()
    with TemporaryStore() as held, TemporaryStore() as other:
        assert {path.name for path in tmp_path.iterdir()} == {held.folder.name, other.folder.name}
    assert list(tmp_path.iterdir()) == []


def test_a_store_computes_once_and_does_without_what_it_cannot_keep(tmp_path: Path) -> None:
    with TemporaryStore() as store:
        assert [store.kept("x", lambda: [1]), store.kept("x", lambda: [2])] == [[1], [1]]
        unpicklable = store.kept("y", lambda: lambda: 3)
        assert (unpicklable(), list(store.folder.glob("y*"))) == (3, [])
