"""What a backend does to its process ends its own cell, with the right status and the reason, and no other."""

import multiprocessing
import re
import signal
import sys
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from testbed.agreement import Calibrated
from testbed.problems import Problem, ProblemError
from testbed.processes import autopsy, child
from testbed.processes.child import Child, Isolation, on_device, starter
from testbed.processes.host import Setup
from testbed.processes.serving import limit_memory
from testbed.records import Record
from tests.processes import SMALL, family, gone, records, start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and limits are Linux'")

ENDS = {
    "first_segfault": ("crash", r"killed by SIGSEGV .* in string_at .*; its last output: about to read address 0"),
    "first_abort": ("crash", r"killed by SIGABRT .* in \w+ \(failing\.py:\d+\)"),
    "first_exit": ("crash", "ended its process with exit code 0"),
    "first_exit_7": ("crash", "ended its process with exit code 7"),
    "first_killed": ("crash", r"killed by SIGKILL \(killed\)"),
    "first_hang": ("timeout", r".* took longer than 10 s \(limits.timeout_s\)"),
    "first_host_memory": ("oom", r".*can't allocate memory.* \(limits.memory_gb: 5\)"),
    "first_poisoned": ("error", r"AcceleratorError: CUDA error: an illegal memory access .*\(failing.py:\d+.*"),
    "first_interrupts": ("error", r"KeyboardInterrupt: not the user \(failing.py:\d+.*"),
    "first_flood": ("error", "wrote more than 64 MiB .* in one step; its last output: I am still here"),
    "timed_segfault": ("crash", "killed by SIGSEGV .*"),
}
ALL = f"""{SMALL}
limits: {{timeout_s: 10, memory_gb: 5}}
timing: {{rounds: 3, max_s: 30}}
backends: [naive, vmap, {", ".join(ENDS)}]
"""
TWICE = f"""{SMALL}
quantities: [grads, norms]
timing: {{rounds: 2, max_s: 30}}
backends: [naive, first_segfault, first_cuda_memory]
"""


class Ran(NamedTuple):
    """A run that has ended."""

    code: int
    out: str
    records: dict[str, Record]
    left: list[Any]  # its processes
    folder: Path


def run(folder: Path, text: str) -> Ran:
    (folder / "e.yaml").write_text(text, encoding="utf-8")
    with start(folder / "e.yaml", "--out", folder / "run", TMPDIR=str(folder)) as process:
        for line in process.stderr:
            if "agreement" in line:
                left = family(process)
                break
        out, err = process.communicate()
    assert "Traceback" not in out + err
    assert "Warning" not in out + err
    return Ran(process.returncode, out, {f"{r.label} {r.quantity}": r for r in records(folder / "run")}, left, folder)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run(tmp_path_factory.mktemp("isolation"), ALL)


@pytest.mark.parametrize("name", ENDS)
def test_a_failure_ends_its_cell_with_status_and_reason(ran: Ran, name: str) -> None:
    status, reason = ENDS[name]
    record = ran.records[f"{name} grads"]
    assert record.status == status
    assert re.fullmatch(reason, record.reason)


@pytest.mark.parametrize("name", ["naive", "vmap"])
def test_the_others_are_measured_as_if_nothing_had_been(ran: Ran, name: str) -> None:
    record = ran.records[f"{name} grads"]
    assert (record.status, len(record.timing["samples_s"]), record.timing["stopped_by"]) == ("ok", 3, "rounds")
    assert record.environment["processes"] == "one a backend"
    assert record.environment["limits"] == {"timeout_s": 10, "memory_gb": 5}


def test_nothing_is_left_behind(ran: Ran) -> None:
    """No process, neither a child nor what a backend has started, and none of the files that children share."""
    assert ran.code == 3
    assert len(ran.left) > len(ENDS)
    assert gone(ran.left)
    assert list(ran.folder.glob("testbed-*")) == []


def test_the_last_output_of_what_crashed_is_kept(ran: Ran) -> None:
    log = (ran.folder / "run" / "errors.log").read_text(encoding="utf-8")
    assert re.search(
        r"^first_segfault, grads\nabout to read address 0\nFatal Python error: Segmentation fault", log, re.M
    )


def test_the_next_cell_of_a_failed_backend_has_a_fresh_child(tmp_path: Path) -> None:
    ended = run(tmp_path, TWICE).records
    assert {name: r.status for name, r in ended.items()} == {
        "naive grads": "ok",
        "first_segfault grads": "crash",
        "first_cuda_memory grads": "oom",
        "naive norms": "ok",
        "first_segfault norms": "ok",
        "first_cuda_memory norms": "ok",
    }


@pytest.mark.parametrize(("memory_gb", "share"), [(28, 0.2), (280, 1.0)])
def test_on_a_gpu_the_limit_is_a_share_of_its_memory(
    memory_gb: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real one is `tests/test_frontier.py`'s, where there is CUDA."""
    set_to: list[tuple[float, int | None]] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=140 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *what: set_to.append(what))
    limit_memory(memory_gb, torch.device("cuda"))
    assert set_to == [(share, None)]


@pytest.mark.parametrize(("device", "how"), [("cpu", "forkserver"), ("cuda", "spawn")])
def test_processes_for_cuda_are_no_forks(device: str, how: str) -> None:
    assert starter(torch.device(device)).get_start_method() == how


def ask(pipe: Connection) -> None:
    pipe.send((torch.cuda._is_in_bad_fork(), "torch._dynamo" in sys.modules))


def test_a_fork_has_imported_pytorch_and_could_still_use_cuda() -> None:
    forks = starter(torch.device("cpu"))
    ours, theirs = forks.Pipe()
    forks.Process(target=ask, args=(theirs,)).start()
    assert ours.recv() == (False, True)


def linear() -> Problem:
    x, y = torch.ones(2, 3), torch.zeros(2, dtype=torch.long)
    return Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(reduction="none"), x, y, x, y)


@pytest.mark.parametrize("how", ["forkserver", "spawn"])
def test_a_child_takes_steps_however_it_was_started(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "starter", lambda device: multiprocessing.get_context(how))
    with closing(Child(Setup(linear, 0, Calibrated()), Isolation())) as started:
        assert started.make() == {}


def deaf() -> Problem:
    raise ProblemError(f"deaf: {signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])}")


def test_a_child_and_what_it_starts_hear_signals() -> None:
    """Ctrl-C is held back only until it is in a group of its own."""
    with closing(Child(Setup(deaf, 0, Calibrated()), Isolation())) as started, pytest.raises(ProblemError) as raised:
        started.make()
    assert str(raised.value) == "deaf: False"


@pytest.mark.parametrize(
    ("device", "reason", "named"),
    [
        ("cpu", "can't allocate memory", True),
        ("cpu", "CUDA out of memory", False),
        ("cuda", "CUDA out of memory", True),
        ("cuda", "can't allocate memory", False),
    ],
)
def test_a_lack_of_memory_names_the_limit_that_it_met(device: str, reason: str, named: bool) -> None:
    child = Child.__new__(Child)
    child._isolation = Isolation(memory_gb=5, device=torch.device(device))
    assert child._with_limit(reason) == reason + " (limits.memory_gb: 5)" * named


@pytest.mark.parametrize(
    ("code", "said", "oom_killed", "status", "reason"),
    [
        (-signal.SIGKILL, "", True, "oom", "killed by SIGKILL (killed): the system was out of memory"),
        (-signal.SIGTERM, "a\nb\n\n", False, "crash", "killed by SIGTERM (terminated); its last output: b"),
        (1, "terminate called\n  what():  std::bad_alloc\n", False, "oom", "exit code 1; its last output: what():"),
        (-250, "", False, "crash", "killed by signal 250"),
        (None, "\x1b[31mred", False, "crash", "broke the connection; its last output: ?[31mred"),
        (3, "x" * 500, False, "crash", "x" * autopsy.LONGEST),
    ],
)
def test_cause(code: int | None, said: str, oom_killed: bool, status: str, reason: str) -> None:
    found = autopsy.cause(code, said, oom_killed)
    assert found[0] == status
    assert reason in found[1]
    assert "\n" not in found[1]


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, 9),
        ({"max": "max"}, 9),
        ({"max": "8000000000", "current": "2000000000"}, 5.4),
        (
            {"max": "8000000000", "current": "7000000000", "stat": "anon 1\ninactive_file 5000000000\nactive_file 9"},
            5.4,
        ),
        ({"max": "99000000000", "current": "2000000000"}, 9),
    ],
    ids=["no group", "no limit", "partly used", "used by files that were read", "more than there is"],
)
def test_on_a_cpu_the_limit_is_a_share_of_what_a_container_has_left(
    files: dict[str, str], limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text, encoding="utf-8")
    memory = SimpleNamespace(available=10**10, total=2 * 10**10)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("testbed.cgroup.FOLDER", str(tmp_path))
    assert on_device(Isolation(), torch.device("cpu")).memory_gb == limit
