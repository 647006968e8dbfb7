"""NVIDIA GPUs, by what `nvidia-smi -q -x` says."""

from collections.abc import Iterator
from xml.etree import ElementTree

from testbed.doctor.finding import Finding, bad, care, fine, unknown
from testbed.doctor.machine import Machine

HARMFUL = {
    "hw_slowdown": "the hardware slows it down",
    "hw_thermal_slowdown": "too hot: the hardware halves its clock or worse",
    "sw_thermal_slowdown": "too hot: the driver lowers its clock",
    "hw_power_brake_slowdown": "the power supply asks it to slow down",
    "sw_power_cap": "it is at its power limit",
}  # why a clock is low, but for idleness and what a person set
NEAR = 10  # °C below the temperature at which it slows down
USUAL = 90  # that temperature, where it does not say


def gpu(machine: Machine) -> Iterator[Finding]:
    """Yield what is found about GPUs."""
    text = machine.run("nvidia-smi", "-q", "-x")
    if text is None:
        yield fine("GPU", "none found (nvidia-smi is not here or does not answer)")
        return
    try:
        log = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        yield unknown("GPU", "nvidia-smi answers what cannot be read")
        return
    found = log.findall("gpu")
    if found and not machine.gpus_of_torch:
        yield bad(
            "GPU",
            f"{len(found)} there, driver {_text(log, 'driver_version')}, but PyTorch can use none",
            "experiments run on the CPU",
            "install a PyTorch for this driver's CUDA, and look at CUDA_VISIBLE_DEVICES",
        )
    for i, one in enumerate(found):
        name = f"GPU {i}"
        yield fine(name, f"{_text(one, 'product_name')}, driver {_text(log, 'driver_version')}")
        for check in (others, clocks, heat, power, persistence, partitions, ecc):
            yield from check(name, i, one)


def others(name: str, index: int, one: ElementTree.Element) -> Iterator[Finding]:
    """Other processes; the doctor itself uses no GPU."""
    programs = [f"{_text(p, 'process_name')} (pid {_text(p, 'pid')})" for p in one.findall("processes/process_info")]
    used, busy = _number(one, "fb_memory_usage/used"), _number(one, "utilization/gpu_util")
    total = _number(one, "fb_memory_usage/total")
    what = f"{used or 0:.0f} of {total or 0:.0f} MiB in use, {busy or 0:.0f} % busy"
    mend = "end them, or take another with CUDA_VISIBLE_DEVICES"
    if programs:
        listed = ", ".join(programs[:3]) + (", …" if len(programs) > 3 else "")
        yield bad(name, f"other processes: {listed}; {what}", "they take its time and its memory", mend)
    elif (busy or 0) > 5 or (used or 0) > 0.02 * (total or 1e9):
        yield bad(name, f"{what}, by processes that cannot be seen from here", "they take its time and memory", mend)
    else:
        yield fine(name, what)


def clocks(name: str, index: int, one: ElementTree.Element) -> Iterator[Finding]:
    """Whether the clock is held down, and whether it is held at one value."""
    reasons = [*one.findall("clocks_event_reasons/*"), *one.findall("clocks_throttle_reasons/*")]
    active = [r.tag.split("_reason_", 1)[-1] for r in reasons if (r.text or "").strip() == "Active"]
    for reason in active:
        if reason in HARMFUL:
            cure = "cool it; look at the fans" if "thermal" in reason else f"look at: nvidia-smi -i {index} -q -d POWER"
            yield bad(name, f"its clock is held down ({reason.replace('_', ' ')})", HARMFUL[reason], cure)
    now, most = _text(one, "clocks/sm_clock"), _number(one, "max_clocks/sm_clock")
    if "applications_clocks_setting" in active:
        yield fine(name, f"its clock is set by a person: {now}")
    elif most:
        yield care(
            name,
            f"its clock may vary: {now} now, up to {most:.0f} MHz",
            "the clock depends on heat and power; the same kernel takes another time in a long run",
            f"sudo nvidia-smi -i {index} --lock-gpu-clocks={0.8 * most:.0f} (afterwards: --reset-gpu-clocks)",
        )


def heat(name: str, index: int, one: ElementTree.Element) -> Iterator[Finding]:
    """How near it is to the temperature at which it slows down."""
    now, left = _number(one, "temperature/gpu_temp"), _number(one, "temperature/gpu_temp_tlimit")
    if now is None:
        yield unknown(name, "it shows no temperature")
        return
    if left is None:  # older drivers say at which temperature it slows down, newer ones how far that is
        left = (_number(one, "temperature/gpu_temp_slow_threshold") or USUAL) - now
    if left <= NEAR:
        yield bad(
            name,
            f"{now:.0f} °C; it slows down at {now + left:.0f} °C",
            "it will slow down in a long run",
            "cool it; look at the fans",
        )
    else:
        yield fine(name, f"{now:.0f} °C")


def power(name: str, index: int, one: ElementTree.Element) -> Iterator[Finding]:
    """Whether its power limit is below what it was built for."""
    for part in ("gpu_power_readings", "power_readings"):  # new and old drivers
        limits = [f"{part}/current_power_limit", f"{part}/enforced_power_limit", f"{part}/power_limit"]
        limit = next((found for path in limits if (found := _number(one, path))), None)
        usual = _number(one, f"{part}/default_power_limit")
        if limit and usual and limit < usual:
            yield care(
                name,
                f"its power limit is {limit:.0f} W, usually {usual:.0f} W",
                "large kernels are slower than on other machines with this GPU",
                f"sudo nvidia-smi -i {index} --power-limit={usual:.0f}",
            )


def persistence(name: str, index: int, one: ElementTree.Element) -> Iterator[Finding]:
    """Whether the driver stays loaded between processes."""
    if _text(one, "persistence_mode") == "Disabled":
        yield care(
            name,
            "persistence mode is off",
            "the driver starts anew with each process: first calls take seconds longer, and settings are forgotten",
            f"sudo nvidia-smi -i {index} --persistence-mode=1",
        )


def partitions(name: str, index: int, one: ElementTree.Element) -> Iterator[Finding]:
    """Whether only a part of it is in use."""
    if _text(one, "mig_mode/current_mig") == "Enabled":
        yield care(
            name,
            "MIG is on: a process sees a part of it",
            "times and memory are those of the part; neighbours share power and clock",
            "say so where you quote figures; or, where nobody needs the parts, ask for the whole GPU",
        )


def ecc(name: str, index: int, one: ElementTree.Element) -> Iterator[Finding]:
    """Error correction: whether it is on, and whether it found errors that it could not mend."""
    paths = ("dram_uncorrectable", "sram_uncorrectable", "sram_uncorrectable_parity", "sram_uncorrectable_secded")
    broken = sum(_number(one, f"ecc_errors/volatile/{path}") or 0 for path in paths)
    if broken:
        yield bad(
            name, f"{broken:.0f} memory errors since it was started", "results may be wrong", "replace or reset it"
        )
    if _text(one, "ecc_mode/current_ecc") == "Disabled":
        yield care(name, "ECC is off", "memory is some percent faster than with it, and errors go unseen")


def _text(one: ElementTree.Element, path: str) -> str:
    return (one.findtext(path) or "").strip()


def _number(one: ElementTree.Element, path: str) -> float | None:
    """Return the number that a text such as `1980 MHz` begins with; None for N/A."""
    try:
        return float(_text(one, path).split()[0])
    except (IndexError, ValueError):
        return None
