"""Backends that do to their process what backends do; given to the command line with `--plugin`."""

import ctypes
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backends import get_backend
from backends.base import Backend, GradsFn, LossFn, register
from backends.batch import Batch


def _segfault() -> None:
    print("about to read address 0", file=sys.stderr, flush=True)
    ctypes.string_at(0)


def _flood() -> None:
    while True:
        os.write(1, b"I am still here\n" * 4096)


def _poisoned() -> None:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def _no_cuda_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB.")


def _interrupts() -> None:
    raise KeyboardInterrupt("not the user")


def _killed_with_a_semaphore() -> None:
    with multiprocessing.get_context("spawn").Lock():  # as `torch.compile` has one, for the system to clean up
        os.kill(os.getpid(), 9)


def _grandchild_holds_the_output() -> None:
    subprocess.Popen(["sleep", "1000"])  # ours to end as well
    os._exit(7)


DEEDS: dict[str, Callable[[], Any]] = {
    "segfault": _segfault,
    "abort": os.abort,
    "exit": lambda: os._exit(0),
    "exit_7": _grandchild_holds_the_output,
    "killed": _killed_with_a_semaphore,
    "hang": lambda: time.sleep(1000),
    "host_memory": lambda: torch.empty(6 * 10**9, dtype=torch.uint8),  # would fit, but for the limit
    "cuda_memory": _no_cuda_memory,
    "poisoned": _poisoned,
    "interrupts": _interrupts,
    "flood": _flood,
}


def plant(name: str, deed: Callable[[], Any], call: int) -> None:
    """Register a backend that is right, but for a deed in a call of the function."""

    @register(name)
    @dataclass(frozen=True)
    class Failing(Backend):
        def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
            right, calls = get_backend("vmap").grads(model, loss_fn), [0]

            def fn(inputs: Batch, targets: Tensor) -> Any:
                calls[0] += 1
                if calls[0] == call:
                    deed()
                return right(inputs, targets)

            return fn

        def norms(self, model: nn.Module, loss_fn: LossFn) -> Any:
            return get_backend("vmap").norms(model, loss_fn)  # the next cell is right, in a fresh child

    Failing.__qualname__ = f"failing {name}"


for _name, _deed in DEEDS.items():
    plant(f"first_{_name}", _deed, 1)
plant("timed_segfault", _segfault, 3)  # after the first call and the untimed one


@register("slow")
@dataclass(frozen=True)
class Slow(Backend):
    """Right, and slow enough to be met while it computes gradients."""

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        right = get_backend("vmap").grads(model, loss_fn)

        def fn(inputs: Batch, targets: Tensor) -> Any:
            time.sleep(0.3)
            return right(inputs, targets)

        return fn

    def norms(self, model: nn.Module, loss_fn: LossFn) -> Any:
        return get_backend("vmap").norms(model, loss_fn)
