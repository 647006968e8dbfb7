"""`python -m testbed doctor`: made-up machines in, findings out."""

from collections.abc import Mapping
from typing import Any

import pytest

import testbed.__main__ as command_line
from testbed.doctor import Grade, Machine, examine
from testbed.doctor.gpu import gpu
from testbed.doctor.host import host
from testbed.doctor.machine import Load
from testbed.doctor.software import allocators, switches

QUIET = Load(average=0.1, busy=0.01, stolen=0.0, busiest=(), memory=(16 * 10**9, 32 * 10**9), swap=(0, 10**9))
CPU = "/sys/devices/system/cpu"
GOOD = {
    f"{CPU}/cpu*/cpufreq/scaling_governor": "performance",
    f"{CPU}/intel_pstate/no_turbo": "1",
    "/sys/class/thermal/thermal_zone*/temp": "41000",
    "/sys/fs/cgroup/cpu.max": "max 100000",
    "/proc/cpuinfo": "flags : fpu avx2",
}


class MadeUp(Machine):
    """A machine that is as a test says."""

    load = QUIET  # type: ignore[assignment]
    variables: Mapping[str, str] = {}
    processors = (8, 8, 8)
    threads = 8
    gpus_of_torch = 1

    def __init__(
        self, files: Mapping[str, str] | None = None, commands: Mapping[str, str] | None = None, **facts: Any
    ) -> None:
        self.files, self.commands = {**GOOD, **(files or {})}, commands or {}
        for name, value in facts.items():
            setattr(self, name, value)

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def read_all(self, pattern: str) -> list[str]:
        return self.files[pattern].split() if pattern in self.files else []

    def run(self, *command: str) -> str | None:
        return self.commands.get(command[0])


def quiet(**changes: Any) -> Load:
    return Load(**{**vars(QUIET), **changes})


BAD = {
    "governor": ({f"{CPU}/cpu*/cpufreq/scaling_governor": "powersave performance"}, {}, "CPU governor", "cpupower"),
    "load": ({}, {"load": quiet(busy=0.6, busiest=(("make", 4.0),))}, "other load", "stop them"),
    "stolen": ({}, {"load": quiet(stolen=0.05)}, "stolen time", "of its own"),
    "threads": ({}, {"processors": (2, 8, 8)}, "threads", "OMP_NUM_THREADS=2"),
    "quota": ({"/sys/fs/cgroup/cpu.max": "150000 100000"}, {}, "CPU limit", "OMP_NUM_THREADS=1"),
    "old quota": (
        {"/sys/fs/cgroup/cpu.max": "", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000"}
        | {"/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
        {},
        "CPU limit",
        "OMP_NUM_THREADS=2",
    ),
    "heat": ({"/sys/class/thermal/thermal_zone*/temp": "40000 96000"}, {}, "heat", "fans"),
    "battery": ({"/sys/class/power_supply/*/status": "Discharging"}, {}, "power", "plug"),
    "memory": ({}, {"load": quiet(memory=(10**9, 32 * 10**9))}, "memory", "end other programs"),
    "container's memory": (
        {"/sys/fs/cgroup/memory.max": "3000000000", "/sys/fs/cgroup/memory.current": "2500000000"},
        {},
        "memory",
        "end other programs",
    ),
}  # files, facts → the topic of the one bad finding, and a word of how to mend it
CARE = {
    "turbo": ({f"{CPU}/intel_pstate/no_turbo": "0"}, {}, "turbo"),
    "hyper-threads": ({}, {"processors": (8, 8, 4)}, "threads"),
    "a part of the processors": ({}, {"processors": (8, 16, 8)}, "threads"),
    "was throttled": (
        {"/sys/fs/cgroup/cpu.max": "800000 100000", "/sys/fs/cgroup/cpu.stat": "nr_throttled 7"},
        {},
        "CPU limit",
    ),
    "slowed down": ({f"{CPU}/cpu*/thermal_throttle/core_throttle_count": "0 3"}, {}, "heat"),
    "load average": ({}, {"load": quiet(average=7.0)}, "other load"),
    "nodes": ({"/sys/devices/system/node/node*/cpulist": "0-3 4-7"}, {}, "NUMA"),
    "virtual machine": ({"/proc/cpuinfo": "model name : x\nflags : fpu hypervisor"}, {}, "virtual machine"),
    "swap": ({}, {"load": quiet(swap=(5 * 10**8, 10**9))}, "swap"),
}


def of(grade: Grade, found: Any) -> list[Any]:
    return [f for f in found if f.grade is grade]


class TestHost:
    def test_a_good_machine_has_nothing_to_mend(self) -> None:
        assert {f.grade for f in host(MadeUp())} == {Grade.FINE}

    @pytest.mark.parametrize("what", BAD)
    def test_finds_what_spoils_numbers(self, what: str) -> None:
        files, facts, topic, mend = BAD[what]
        (finding,) = of(Grade.BAD, host(MadeUp(files, **facts)))
        assert (finding.topic, mend in finding.mend) == (topic, True)

    @pytest.mark.parametrize("what", CARE)
    def test_finds_what_may_matter(self, what: str) -> None:
        files, facts, topic = CARE[what]
        assert [f.topic for f in of(Grade.CARE, host(MadeUp(files, **facts)))] == [topic]

    def test_says_what_it_cannot_see(self) -> None:
        blind = MadeUp()
        blind.files.clear()
        assert [f.topic for f in of(Grade.UNKNOWN, host(blind))] == ["CPU governor", "turbo", "heat"]

    def test_names_the_busiest(self) -> None:
        (finding,) = of(Grade.BAD, host(MadeUp(load=quiet(busy=0.5, busiest=(("make", 4.0),)))))
        assert "make (400 %)" in finding.what


class TestSoftware:
    @pytest.mark.parametrize(("value", "count"), [("1", 1), ("0", 0), ("", 0)])
    def test_finds_switches(self, value: str, count: int) -> None:
        assert len(list(switches(MadeUp(variables={"CUDA_LAUNCH_BLOCKING": value})))) == count

    def test_names_a_tuned_allocator(self) -> None:
        (finding,) = of(Grade.CARE, allocators(MadeUp(variables={"MALLOC_ARENA_MAX": "1", "HOME": "/"})))
        assert finding.what == "MALLOC_ARENA_MAX=1"


XML = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log><driver_version>580.1</driver_version><gpu id="0">
<product_name>Loom</product_name><persistence_mode>Enabled</persistence_mode>
<mig_mode><current_mig>Disabled</current_mig></mig_mode>
<fb_memory_usage><total>81559 MiB</total><used>500 MiB</used></fb_memory_usage>
<utilization><gpu_util>0 %</gpu_util></utilization>
<ecc_mode><current_ecc>Enabled</current_ecc></ecc_mode>
<ecc_errors><volatile><dram_uncorrectable>0</dram_uncorrectable></volatile></ecc_errors>
<temperature><gpu_temp>35 C</gpu_temp><gpu_temp_slow_threshold>90 C</gpu_temp_slow_threshold></temperature>
<gpu_power_readings><current_power_limit>700.00 W</current_power_limit>
<default_power_limit>700.00 W</default_power_limit></gpu_power_readings>
<clocks><sm_clock>1500 MHz</sm_clock></clocks><max_clocks><sm_clock>1980 MHz</sm_clock></max_clocks>
<clocks_event_reasons><clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
<clocks_event_reason_applications_clocks_setting>Active</clocks_event_reason_applications_clocks_setting>
<clocks_event_reason_hw_thermal_slowdown>Not Active</clocks_event_reason_hw_thermal_slowdown>
</clocks_event_reasons><processes></processes>
</gpu></nvidia_smi_log>"""
PROCESS = "<processes><process_info><pid>42</pid><process_name>python</process_name></process_info></processes>"
GPU_BAD = {
    "hot": ("hw_thermal_slowdown>Not Active", "hw_thermal_slowdown>Active", "held down (hw thermal slowdown)"),
    "older driver": (
        "<clocks_event_reasons>",
        "<clocks_throttle_reasons><clocks_throttle_reason_sw_power_cap>Active</clocks_throttle_reason_sw_power_cap>"
        "</clocks_throttle_reasons><clocks_event_reasons>",
        "held down (sw power cap)",
    ),
    "process": ("<processes></processes>", PROCESS, "python (pid 42)"),
    "unseen process": ("<used>500 MiB", "<used>40000 MiB", "cannot be seen from here"),
    "busy": ("<gpu_util>0 %", "<gpu_util>93 %", "93 % busy"),
    "near its limit": ("<gpu_temp>35 C", "<gpu_temp>84 C", "it slows down at 90 °C"),
    "near its limit, newer driver": (
        "<gpu_temp>35 C</gpu_temp>",
        "<gpu_temp>80 C</gpu_temp><gpu_temp_tlimit>7 C</gpu_temp_tlimit>",
        "at 87 °C",
    ),
    "broken memory": ("<dram_uncorrectable>0", "<dram_uncorrectable>3", "3 memory errors"),
}  # in the XML: old, new → what is found
GPU_CARE = {
    "power": ("<current_power_limit>700", "<current_power_limit>400", "power limit is 400 W, usually 700 W"),
    "persistence": ("<persistence_mode>Enabled", "<persistence_mode>Disabled", "persistence mode is off"),
    "MIG": ("<current_mig>Disabled", "<current_mig>Enabled", "MIG is on"),
    "ECC": ("<current_ecc>Enabled", "<current_ecc>Disabled", "ECC is off"),
    "clock": ("clocks_setting>Active", "clocks_setting>Not Active", "1500 MHz now, up to 1980 MHz"),
}


class TestGpu:
    def test_a_good_one_has_nothing_to_mend(self) -> None:
        assert {f.grade for f in gpu(MadeUp(commands={"nvidia-smi": XML}))} == {Grade.FINE}

    @pytest.mark.parametrize(
        ("grade", "what"), [(Grade.BAD, what) for what in GPU_BAD] + [(Grade.CARE, what) for what in GPU_CARE]
    )
    def test_finds(self, grade: Grade, what: str) -> None:
        old, new, said = {**GPU_BAD, **GPU_CARE}[what]
        assert old in XML
        (finding,) = of(grade, gpu(MadeUp(commands={"nvidia-smi": XML.replace(old, new)})))
        assert said in finding.what

    def test_torch_that_cannot_use_it(self) -> None:
        (finding,) = of(Grade.BAD, gpu(MadeUp(commands={"nvidia-smi": XML}, gpus_of_torch=0)))
        assert "1 there, driver 580.1, but PyTorch can use none" in finding.what

    def test_none(self) -> None:
        assert [f.grade for f in gpu(MadeUp())] == [Grade.FINE]

    def test_garbage(self) -> None:
        assert [f.grade for f in gpu(MadeUp(commands={"nvidia-smi": "Failed to initialize NVML"}))] == [Grade.UNKNOWN]

    def test_numbers_that_are_not_available(self) -> None:
        text = (
            XML.replace("35 C", "N/A")
            .replace("700.00 W", "[N/A]")
            .replace("81559 MiB", "N/A")
            .replace("500 MiB", "N/A")
        )
        assert of(Grade.BAD, gpu(MadeUp(commands={"nvidia-smi": text}))) == []


def test_the_command_looks_at_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.doctor.machine.WATCHED_S", 0.01)
    assert command_line.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith(("Fit to measure on", "Not fit to measure on now"))
    assert "libraries: torch " in out


def test_every_finding_that_matters_says_what_it_does() -> None:
    everything = {k: v for files, *_ in [*BAD.values(), *CARE.values()] for k, v in files.items()}
    found = examine(MadeUp(everything, {"nvidia-smi": XML}, processors=(2, 8, 8)))
    assert all(f.effect for f in found if f.grade in (Grade.BAD, Grade.CARE))
    assert all(f.mend for f in found if f.grade is Grade.BAD)
