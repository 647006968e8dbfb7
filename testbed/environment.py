"""What a number depends on beside the code: machine, versions, settings, commit."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Container, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import backends
from backends import available, backend_class, precision
from testbed import nvml

LIBRARIES = ("torch", "torchvision", "numpy", "pydantic", "scikit-learn", "triton")  # and those of the backends


def environment(device: torch.device) -> dict[str, Any]:
    """Return the environment of a run on a device, as plain data."""
    cudnn = torch.backends.cudnn
    found: dict[str, Any] = {
        **_fixed(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "tf32": precision.tf32_in_products(),
        "cudnn": {
            "allow_tf32": precision.tf32_in_convolutions(),
            "benchmark": cudnn.benchmark,
            "deterministic": cudnn.deterministic,
        },
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "default",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "driver": nvml.driver(),
            "clocks": nvml.clocks(device),
        }
    return found


def device_name(environment: dict[str, Any]) -> str:
    """Return the device in words: the GPU, or the processor and its threads."""
    if gpu := environment.get("gpu"):
        return f"{gpu.get('name', 'GPU')} (CUDA {gpu.get('cuda', '?')}, driver {gpu.get('driver', '?')})"
    if "processor" not in environment:  # a record of a sweep, or of an earlier version
        return "device not recorded"
    return f"{environment['processor']}, {environment.get('threads', '?')} threads"


def flat(environment: Mapping[str, Any], without: Container[str] = (), prefix: str = "") -> dict[str, str]:
    """Return an environment as {dotted key: text}, without some keys."""
    found: dict[str, str] = {}
    for key, value in environment.items():
        if isinstance(value, Mapping):
            found |= flat(value, without, f"{prefix}{key}.")
        elif key not in without:
            found[prefix + key] = str(value)
    return found


def _backends_libraries() -> list[str]:
    return sorted({package for name in available() for package in backend_class(name).requires.values()})


@cache
def _fixed() -> dict[str, Any]:
    """Return what does not change while the process lives."""
    here = Path(__file__).parent
    return {
        "machine": hashlib.sha256(platform.node().encode()).hexdigest()[:8],  # which one, without its name
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": {name: found for name in (*LIBRARIES, *_backends_libraries()) if (found := _version(name))},
        "commit": _run("git", "rev-parse", "HEAD"),
        "dirty": bool(_run("git", "status", "--porcelain", "--untracked-files=no")),  # `source` knows new code
        "source": source_of(here, Path(backends.__file__).parent),
    }


def source_of(*places: Path) -> str:
    """Return a hash of Python files, and of all that are in folders."""
    found = hashlib.sha256()
    for place in places:
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found.update(f"{file.relative_to(place.parent)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the processor's name, with fewer words where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _of_gpu(properties: Any, what: str) -> str | None:  # noqa: ANN401  torch names no type for them
    """Return what `nvidia-smi` says of one of the GPUs."""
    gpu = f"GPU-{str(properties.uuid).removeprefix('GPU-')}"
    return _run("nvidia-smi", f"--id={gpu}", f"--query-gpu={what}", "--format=csv,noheader")


def _run(*command: str) -> str | None:
    """Return what a command prints, run where this file is; None where it cannot be run."""
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
