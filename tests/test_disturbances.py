"""What disturbs a measurement is noticed; what a quiet machine does is not."""

import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pynvml
import pytest
import torch

from testbed import nvml
from testbed.disturbances import Clock, Watch, others, stolen, throttled
from testbed.environment import device_name, environment
from tests.processes import program


@pytest.mark.parametrize(
    ("found", "sentences"),
    [
        (others(all_busy=15.0, own=5.0, elapsed=10.0, cores=4), ["other programs used 1.0 of 4 cores"]),
        (others(all_busy=5.5, own=5.0, elapsed=10.0, cores=4), []),
        (others(all_busy=15.0, own=5.0, elapsed=10.0, cores=128), []),
        (stolen(2.0, elapsed=10.0, cores=2), ["the hypervisor took 10 % of the processors' time"]),
        (stolen(0.0, elapsed=10.0, cores=2), []),
        (Clock("CPU", [3000.0, 2000.0]).sentences(), ["the CPU's clock moved between 2000 and 3000 MHz"]),
        (Clock("CPU", [3000.0, 2900.0]).sentences(), []),
        (Clock("CPU", [0.0, 3000.0]).sentences(), []),
        (throttled(0x44), ["the GPU was slowed down by its power limit, its temperature (hardware)"]),
        (throttled(0x01), []),  # idle
    ],
)
def test_sentences(found: Iterator[str], sentences: list[str]) -> None:
    assert list(found) == sentences


def test_another_program_is_noticed_and_our_own_is_not() -> None:
    with program([sys.executable, "-c", "while True: pass"]) as busy:
        alone, together = (Watch(torch.device("cpu"), pids) for pids in ([os.getpid()], [os.getpid(), busy.pid]))
        while psutil.Process(busy.pid).cpu_times().user < 0.5:  # on a busy machine it has to wait for its turn
            sum(i * i for i in range(10**6))
        noticed, own, said = alone._used(), together._used(), alone.sentences()
        busy.kill()  # one that has ended, and was waited for, would count as this process' own
    assert own > noticed
    assert any(sentence.startswith("other programs used") for sentence in said)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand for a machine with two GPUs, of which PyTorch sees the second one."""
    about = SimpleNamespace(name="H200", total_memory=1, major=9, minor=0, uuid="b")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    clocks = {("GPU-a", 1): 100, ("GPU-a", 2): 101, ("GPU-b", 1): 200, ("GPU-b", 2): 201}
    for name, stub in {
        "Init": lambda: None,
        "SystemGetDriverVersion": lambda: "1.2.3",
        "DeviceGetHandleByUUID": lambda uuid: uuid,
        "DeviceGetClockInfo": lambda gpu, which: clocks[gpu, which],
        "DeviceGetMaxClockInfo": lambda gpu, which: 10 * clocks[gpu, which],
    }.items():
        monkeypatch.setattr(pynvml, f"nvml{name}", stub)
    nvml.driver.cache_clear()
    yield
    nvml.driver.cache_clear()


@pytest.mark.usefixtures("two_gpus")
def test_the_environment_is_of_the_gpu_that_is_computed_on() -> None:
    found = environment(torch.device("cuda"))
    assert (found["gpu"]["driver"], found["gpu"]["clocks"]) == ("1.2.3", "200 MHz, 201 MHz, 2000 MHz")
    assert device_name(found) == f"H200 (CUDA {torch.version.cuda}, driver 1.2.3)"


@pytest.mark.usefixtures("two_gpus")
def test_what_nvml_cannot_say_is_left_unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlInit", nothing)
    found = environment(torch.device("cuda"))
    assert (found["gpu"]["driver"], found["gpu"]["clocks"]) == (None, None)
