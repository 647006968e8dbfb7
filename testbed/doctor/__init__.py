"""What about this machine would make its numbers untrustworthy, and how to mend it."""

from testbed.doctor.finding import Finding, Grade
from testbed.doctor.gpu import gpu
from testbed.doctor.host import host
from testbed.doctor.machine import Machine
from testbed.doctor.software import software

__all__ = ["Finding", "Grade", "Machine", "examine"]


def examine(machine: Machine | None = None) -> list[Finding]:
    """Look at the machine: processor and memory, software, GPUs."""
    looked_at = machine or Machine()
    return [*host(looked_at), *software(looked_at), *gpu(looked_at)]
