"""What disturbs a measurement is noticed; what a quiet machine does is not."""

import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
import torch

from testbed.disturbances import Clock, Watch, others, stolen, throttled


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
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        alone, together = (Watch(torch.device("cpu"), pids) for pids in ([os.getpid()], [os.getpid(), busy.pid]))
        while psutil.Process(busy.pid).cpu_times().user < 0.5:  # on a busy machine it has to wait for its turn
            sum(i * i for i in range(10**6))
        noticed, own = alone._used(), together._used()
        busy.kill()
    assert own > noticed
    assert any(sentence.startswith("other programs used") for sentence in alone.sentences())
