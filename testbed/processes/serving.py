"""What runs in a child process: it ties itself to its parent, and takes the steps of a host from a pipe."""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from backends import load_plugin
from backends.base import Unsupported, first_line
from testbed.problems import ProblemError
from testbed.processes import autopsy
from testbed.processes.host import Failed, Host
from testbed.processes.shield import let_through

BYTES = 1e9  # in a GB


def serve(pipe: Connection, output: Connection, plugins: Sequence[str], about: bytes) -> None:
    """Take steps from a pipe until it ends; this is what runs in the child."""
    os.setsid()  # out of reach of the terminal's Ctrl-C; a group of its own, to be ended as one
    let_through()
    _die_with_parent()
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()  # a crash says where
    for plugin in plugins:
        load_plugin(plugin)
    setup, threads, memory_gb, device = pickle.loads(about)  # only now: it may hold what a plug-in defines
    torch.set_num_threads(threads)
    host = Host(setup)
    if memory_gb is not None:
        limit_memory(memory_gb, device)
    pipe.send((None, None))
    with suppress(EOFError):
        while True:
            step, arguments = pipe.recv()
            pipe.send(_answer(host, step, arguments))


def limit_memory(memory_gb: float, device: torch.device) -> None:
    """Let this process take so many GB of a device's memory; what asks for more is out of memory.

    On a GPU it is what PyTorch's allocator holds, without what CUDA takes for itself; on a CPU what can be written to.
    """
    if device.type == "cuda":
        share = memory_gb * BYTES / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device.index)
        return
    import resource  # not on Windows, where runs are in-process

    # Not RLIMIT_AS: PyTorch's CUDA build reserves more addresses than any machine has memory.
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb * BYTES),) * 2)


def _answer(host: Host, step: str, arguments: Sequence[Any]) -> tuple[Any, Exception | None]:
    try:
        return getattr(host, step)(*arguments), None
    except (Failed, ProblemError) as error:
        return None, error
    except Unsupported as refusal:
        return None, Unsupported(first_line(refusal))
    except BaseException as error:  # KeyboardInterrupt too: nobody can press Ctrl-C here, the backend raises it
        return None, Failed.of(error)


def _die_with_parent() -> None:
    """See to it that this process ends when its parent does, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    if sys.platform == "linux":
        autopsy.die_with_parent_thread()  # also where a call holds the interpreter's lock for ever
