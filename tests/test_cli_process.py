"""The command line as a process: what only that shows."""

import json
import os
import pty
import re
import signal
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from testbed.records import read_records
from tests.command_line import SMALL, Ended, message
from tests.processes import ROOT, program, wait_for

FIELDS = """cell experiment problem backend options quantity status reason agreement diagnosis phases timing memory
    environment"""
TIMING = {"median_s", "p5_s", "p95_s", "samples_s", "ratio", "ratio_ci", "verdict"}
OF_THE_CALLER = ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TERM", "PYTHONUNBUFFERED")  # would change what is tested
INTERRUPTING = """
import os, signal, sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
"""  # somebody presses Ctrl-C in that moment
FOREVER = "timing={rounds: 1000000, max_s: 60}"
linux = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux'")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in OF_THE_CALLER}


def start(*arguments: object, **options: Any) -> AbstractContextManager[Any]:
    """Start the command line as a process."""
    command = [sys.executable, "-m", "testbed", *map(str, arguments)]
    return program(command, **{"cwd": ROOT, "env": ENVIRONMENT, **options})


def start_in_a_shell(streams: str, *arguments: object) -> AbstractContextManager[Any]:
    """Start the command line by a shell that does something to its standard streams."""
    command = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, "-m", "testbed", *map(str, arguments)]
    return program(command, cwd=ROOT, env=ENVIRONMENT)


def end(started: AbstractContextManager[Any]) -> Ended:
    """Wait until a process has ended, and return how."""
    with started as process:
        out, err = process.communicate()
    return Ended(process.returncode, out, err)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """Run the small experiment once, piped; return its folder and how it ended."""
    folder = tmp_path_factory.mktemp("process")
    (folder / "small.yaml").write_text(SMALL, encoding="utf-8")
    return folder / "run", end(start(folder / "small.yaml", "--out", folder / "run"))


class TestProcess:
    """What only a process shows; each costs seconds."""

    def test_ends_well_and_says_where_the_records_are(self, ran: tuple[Path, Ended]) -> None:
        folder, ended = ran
        assert ended.code == 0
        assert ended.out.startswith("small: A small one.\ndevice: cpu\n")
        assert ended.out.endswith(f"records in {folder}\nreport in {folder}/report.html\n")
        assert (folder / "report.html").exists()

    def test_table_has_every_backend_and_no_escape_codes(self, ran: tuple[Path, Ended]) -> None:
        _, ended = ran
        rows = [line.split()[:3] for line in ended.out.splitlines()]
        assert ["naive", "ok", "native"] in rows
        assert ["vmap", "ok", "native"] in rows
        assert "\x1b" not in ended.out + ended.err

    def test_progress_is_lines(self, ran: tuple[Path, Ended]) -> None:
        lines = [re.sub(r"^\[ *\d+\.\d s\] ", "", line) for line in ran[1].err.splitlines()]
        work = ["problem", "grads: agreement", "grads: timing", "grads: memory, and agreement on fresh data"]
        slow = re.compile(r": .+ \(\d+ of \d+\)")  # a step gets its own line after a long silence
        assert [line for line in lines if not slow.search(line)] == work

    def test_records_have_the_promised_fields(self, ran: tuple[Path, Ended]) -> None:
        records = [json.loads(line) for line in (ran[0] / "results.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [r["backend"] for r in records] == ["naive", "vmap"]
        for record in records:
            assert list(record) == FIELDS.split()
            assert record["timing"].keys() >= TIMING
            assert len(record["timing"]["samples_s"]) == 2
            assert record["environment"]["versions"]["torch"] in torch.__version__

    def test_environment_is_that_of_the_records(self, ran: tuple[Path, Ended]) -> None:
        environment = json.loads((ran[0] / "environment.json").read_text(encoding="utf-8"))
        recorded = read_records(ran[0] / "results.jsonl")[0].environment
        assert environment == {key: recorded[key] for key in environment}

    def test_resolved_experiment_runs_again(self, ran: tuple[Path, Ended], call: Any, tmp_path: Path) -> None:
        def cells(folder: Path) -> list[tuple[Any, ...]]:
            return [(r.problem, r.backend, r.quantity, r.status) for r in read_records(folder / "results.jsonl")]

        again = call(ran[0] / "experiment.yaml", "--out", tmp_path / "run")
        assert again.code == 0
        assert cells(tmp_path / "run") == cells(ran[0])
        resolved = [(folder / "experiment.yaml").read_text(encoding="utf-8") for folder in (ran[0], tmp_path / "run")]
        assert resolved[0] == resolved[1]

    def test_user_error(self, tmp_path: Path) -> None:
        assert message(end(start(tmp_path / "x.yaml"))).startswith(f"{tmp_path / 'x.yaml'}: no such file")

    @linux
    def test_name_that_is_not_utf_8_is_refused_before_anything_is_measured(self, small: Path) -> None:
        os.rename(small, bytes(small.parent) + b"/na\xefve.yaml")
        named = os.fsdecode(bytes(small.parent) + b"/na\xefve.yaml")
        said = message(end(start(named, "--out", small.parent / "run")))
        assert said.startswith(f"{small.parent}/na\\xefve.yaml: has a byte that is not UTF-8")
        assert not (small.parent / "run").exists()

    def test_interrupt_while_libraries_are_imported(self, tmp_path: Path) -> None:
        (tmp_path / "sitecustomize.py").write_text(INTERRUPTING, encoding="utf-8")
        ended = end(start("list", env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}))
        assert ended == (130, "", "testbed: interrupted\n")

    def test_reader_that_has_enough_ends_it_quietly(self) -> None:
        with start("list", "models") as process:
            process.stdout.close()
            assert process.wait(timeout=60) == 130
            assert process.stderr.read() == ""

    @linux
    def test_progress_that_cannot_be_written_is_dropped(self, small: Path) -> None:
        code, out, _ = end(start_in_a_shell("2>/dev/full", small, "--out", small.parent / "run"))
        assert code == 0
        assert out.endswith(f"report in {small.parent}/run/report.html\n")

    @pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
    def test_stream_that_is_closed_changes_no_run(self, small: Path, streams: str) -> None:
        folder = small.parent / "run"
        code, out, err = end(start_in_a_shell(streams, small, "--out", folder))
        assert code == 0
        assert [r.status for r in read_records(folder / "results.jsonl")] == ["ok", "ok"]
        assert out.endswith(f"report in {folder}/report.html\n") == (">&-" not in streams.split())
        assert ("grads: timing" in err) == ("2>&-" not in streams)

    @linux
    @pytest.mark.parametrize("arguments", [["x.yaml"], ["list", "--nothing"], ["list", "backend"]])
    def test_user_error_that_cannot_be_written_is_one_all_the_same(self, arguments: list[str]) -> None:
        assert end(start_in_a_shell("2>/dev/full", *arguments)).code == 2

    def test_reader_that_has_enough_of_both_streams_ends_a_run(self, small: Path) -> None:
        with start_in_a_shell("2>&1", small, "--out", small.parent / "run", "--set", FOREVER) as process:
            process.stdout.readline()
            process.stdout.close()
            assert process.wait(timeout=60) == 130

    def test_terminal_has_a_bar_and_no_colour_where_none_is_wanted(self, small: Path) -> None:
        terminal, inside = pty.openpty()
        environment = {**ENVIRONMENT, "TERM": "xterm-256color", "NO_COLOR": "1"}
        with start(small, "--out", small.parent / "run", stdout=inside, stderr=inside, env=environment) as process:
            os.close(inside)
            shown = read_all(terminal)
        assert process.returncode == 0
        assert "grads: timing" in shown
        assert "━" in shown
        assert not re.search("\x1b\\[[0-9;]*(3|4|9|10)[0-8][;m]", shown)

    def test_interrupt_keeps_what_was_measured(self, small: Path) -> None:
        folder = small.parent / "run"
        with start(small, "--out", folder, "--set", FOREVER) as process:
            wait_for(process, "grads: timing")
            process.send_signal(signal.SIGINT)
            since = time.monotonic()
            out, err = process.communicate()
        assert time.monotonic() - since < 10
        assert (process.returncode, err) == (130, "")
        assert f"interrupted; what was measured is in {folder}\n" in out
        cells = [(r.backend, r.status) for r in read_records(folder / "results.jsonl")]
        assert cells == [("naive", "interrupted"), ("vmap", "interrupted")]


def read_all(terminal: int) -> str:
    """Return everything that is written to a terminal until its last user has closed it."""
    found = b""
    try:
        while part := os.read(terminal, 65536):
            found += part
    except OSError:  # Linux' way to say that it is closed
        pass
    os.close(terminal)
    return found.decode()
