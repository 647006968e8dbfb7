"""What NVIDIA's management library says of the GPU that is computed on, whatever others there are."""

from functools import cache
from typing import Any

import pynvml
import torch

SILENT = (pynvml.NVMLError, AttributeError)  # what NVML cannot say on this machine is left unsaid


def handle(device: torch.device) -> Any:  # noqa: ANN401  NVML's own
    """Return what NVML knows a GPU by; PyTorch's index counts visible ones only, so it is looked up by its UUID.

    Raises:
        NVMLError: NVML is not there, or does not know it.
        AttributeError: PyTorch does not tell the UUID.
    """
    pynvml.nvmlInit()
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")


@cache
def driver() -> str | None:
    """Return the driver's version, which all GPUs share."""
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except SILENT:
        return None


def clocks(device: torch.device) -> str | None:
    """Return a GPU's clocks: of its multiprocessors and its memory now, and the former's highest."""
    try:
        gpu = handle(device)
        now = [pynvml.nvmlDeviceGetClockInfo(gpu, which) for which in (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM)]
        most = pynvml.nvmlDeviceGetMaxClockInfo(gpu, pynvml.NVML_CLOCK_SM)
    except SILENT:
        return None
    return ", ".join(f"{mhz} MHz" for mhz in (*now, most))
