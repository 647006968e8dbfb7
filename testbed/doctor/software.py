"""Libraries, allocators and switches that change what is measured."""

import os
from collections.abc import Iterator
from pathlib import Path

from testbed.doctor.finding import Finding, bad, care, fine
from testbed.doctor.machine import Machine
from testbed.environment import LIBRARIES, environment

SPOILERS = {
    "CUDA_LAUNCH_BLOCKING": "every kernel waits for the one before: launching and running cannot overlap",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every tensor is allocated by the driver",
    "PYTHONMALLOC": "Python's allocator is replaced",
    "NVIDIA_TF32_OVERRIDE": "TF32 is forced on or off, whatever the experiment says",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "TF32 is forced on, whatever the experiment says",
}  # variable: what it does to the numbers
OF_ALLOCATORS = ("LD_PRELOAD", "MALLOC_", "GLIBC_TUNABLES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
OF_THREADS = ("OMP_", "MKL_", "KMP_", "GOMP_")


def software(machine: Machine) -> Iterator[Finding]:
    """Yield what is found about libraries and settings."""
    yield from switches(machine)
    yield from allocators(machine)
    yield from high_water(machine)
    yield from libraries(machine)


def switches(machine: Machine) -> Iterator[Finding]:
    """Variables that slow everything down or change its precision."""
    for name, effect in SPOILERS.items():
        if machine.variables.get(name, "0") not in ("", "0", "default"):
            yield bad("variable", f"{name}={machine.variables[name]}", effect, f"unset {name}")


def allocators(machine: Machine) -> Iterator[Finding]:
    """Memory allocators and threading libraries that were tuned."""
    for topic, starts in (("malloc", OF_ALLOCATORS), ("threading", OF_THREADS)):
        found = [f"{k}={v}" for k, v in sorted(machine.variables.items()) if k.startswith(starts)]
        if found:
            yield care(
                topic, ", ".join(found), "times and memory are those of this setting: say so where you quote them"
            )
        else:
            yield fine(topic, "the system's own settings")


def high_water(machine: Machine) -> Iterator[Finding]:
    """Whether peak memory can be measured on a CPU."""
    file = "/proc/self/clear_refs"
    if machine.read("/proc/self/status") and not (Path(file).exists() and os.access(file, os.W_OK)):
        yield care("peak memory", f"{file} cannot be written", "peak memory of a call on the CPU is not measured")


def libraries(machine: Machine) -> Iterator[Finding]:
    """Versions, and the commit that runs."""
    import torch

    found = environment(torch.device("cpu"))
    missing = [name for name in LIBRARIES if name not in found["versions"]]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield fine("libraries", versions + (f"; not installed: {', '.join(missing)}" if missing else ""))
    if found["dirty"]:
        yield care(
            "commit", f"{(found['commit'] or 'none')[:7]}, with changes", "nobody can run this code again", "commit"
        )
