"""Processor and memory: what makes the same call take another time."""

from collections.abc import Iterator

from testbed import cgroup
from testbed.doctor.finding import Finding, bad, care, fine, unknown
from testbed.doctor.machine import Machine
from testbed.report import units

CPU = "/sys/devices/system/cpu"
HOT = 90  # °C: most processors slow down a little above
BUSY = 0.1  # share of all processors that others may use before it shows in the rounds
STOLEN = 0.005
LITTLE = 2e9  # bytes of memory under which a batch that fits today may not fit tomorrow


def host(machine: Machine) -> Iterator[Finding]:
    """Yield what is found about processor and memory."""
    for check in (governor, turbo, load, stolen, threads, quota, heat, battery, nodes, virtual, memory, swap):
        yield from check(machine)


def governor(machine: Machine) -> Iterator[Finding]:
    """The clock's policy."""
    found = sorted(set(machine.read_all(f"{CPU}/cpu*/cpufreq/scaling_governor")))
    if not found:
        yield unknown("CPU governor", "the system does not show it (usual in a virtual machine or a container)")
    elif found == ["performance"]:
        yield fine("CPU governor", "performance")
    else:
        yield bad(
            "CPU governor",
            ", ".join(found),
            "the clock follows the load, so that the first calls are slower than the later ones",
            "sudo cpupower frequency-set -g performance",
        )


def turbo(machine: Machine) -> Iterator[Finding]:
    """Clocks above the nominal one."""
    intel, other = machine.read(f"{CPU}/intel_pstate/no_turbo"), machine.read(f"{CPU}/cpufreq/boost")
    if intel is None and other is None:
        yield unknown("turbo", "the system does not show it")
    elif intel == "0" or (intel is None and other == "1"):
        file, off = ("intel_pstate/no_turbo", 1) if intel is not None else ("cpufreq/boost", 0)
        yield care(
            "turbo",
            "on",
            "the clock depends on heat and on how many cores work; long runs slow down",
            f"echo {off} | sudo tee {CPU}/{file}",
        )
    else:
        yield fine("turbo", "off")


def load(machine: Machine) -> Iterator[Finding]:
    """Other programs."""
    found, (_, processors, _) = machine.load, machine.processors
    names = ", ".join(f"{name} ({100 * share:.0f} %)" for name, share in found.busiest)
    what = f"{100 * found.busy:.0f} % of the processors in use now, load average {found.average:.1f} on {processors}"
    if found.busy <= BUSY and found.average > max(0.5, 0.25 * processors):
        yield care(
            "other load",
            what,
            "something took the processor until a moment ago, and may do so again",
            "wait a minute, and ask again",
        )
    elif found.busy > BUSY:
        yield bad(
            "other load",
            what + (f": {names}" if names else ""),
            "other programs take the processor, its caches and the memory's bandwidth away in some rounds",
            "stop them, or wait until they end",
        )
    else:
        yield fine("other load", what)


def stolen(machine: Machine) -> Iterator[Finding]:
    """Time that the hypervisor took."""
    share = machine.load.stolen
    if share > STOLEN:
        yield bad(
            "stolen time",
            f"{100 * share:.1f} %",
            "the hypervisor gave the processor to other virtual machines",
            "take a machine with processors of its own",
        )


def threads(machine: Machine) -> Iterator[Finding]:
    """PyTorch's threads against the processors there are."""
    (usable, logical, cores), count = machine.processors, machine.threads
    what = f"PyTorch uses {count} on {cores} cores ({logical} processors, {usable} usable)"
    if count > usable:
        yield bad(
            "threads", what, "threads wait for each other's processor", f"export OMP_NUM_THREADS={min(usable, cores)}"
        )
    elif count > cores:
        yield care(
            "threads",
            what,
            "two threads share a core: little faster, and less even",
            f"export OMP_NUM_THREADS={min(usable, cores)}",
        )
    elif usable < logical:
        yield care("threads", what, "this process may use some processors only; figures are those of this part")
    else:
        yield fine("threads", what)


def quota(machine: Machine) -> Iterator[Finding]:
    """The container's share of the processors."""
    allowed = _quota(machine)
    if allowed is None:
        yield fine("CPU limit", "none")
        return
    what = f"the container may use {allowed:.2g} processors"
    stopped = _stopped(machine)
    if machine.threads > allowed:
        yield bad(
            "CPU limit",
            what,
            "after its share of every tenth of a second all threads are stopped until the next one",
            f"export OMP_NUM_THREADS={max(1, int(allowed))}, or lift the limit (docker run --cpus …)",
        )
    elif stopped:
        yield care("CPU limit", f"{what}; it was stopped {stopped} times since it began", "some calls contain a pause")
    else:
        yield fine("CPU limit", what)


def heat(machine: Machine) -> Iterator[Finding]:
    """Temperatures, and whether the processor slowed down for them."""
    degrees = [int(t) / 1000 for t in machine.read_all("/sys/class/thermal/thermal_zone*/temp") if t.isdigit()]
    slowed = sum(int(n) for n in machine.read_all(f"{CPU}/cpu*/thermal_throttle/core_throttle_count") if n.isdigit())
    if degrees and max(degrees) >= HOT:
        yield bad("heat", f"{max(degrees):.0f} °C", "the processor slows down to cool", "let it cool; look at the fans")
    elif slowed:
        yield care(
            "heat",
            f"the processor slowed down {slowed} times since it was started",
            "long runs may be slower",
            "cool it",
        )
    elif degrees:
        yield fine("heat", f"{max(degrees):.0f} °C")
    else:
        yield unknown("heat", "the system shows no temperature")


def battery(machine: Machine) -> Iterator[Finding]:
    """Whether a battery feeds the machine."""
    if "Discharging" in machine.read_all("/sys/class/power_supply/*/status"):
        yield bad("power", "on battery", "clocks are lowered to save it", "plug it in")


def nodes(machine: Machine) -> Iterator[Finding]:
    """Memory that is nearer to some cores than to others."""
    count = len(machine.read_all("/sys/devices/system/node/node*/cpulist"))
    if count > 1:
        yield care(
            "NUMA",
            f"{count} nodes",
            "memory of the other node is slower, and where pages lie changes from run to run",
            "numactl --cpunodebind=0 --membind=0 python -m testbed …",
        )


def virtual(machine: Machine) -> Iterator[Finding]:
    """Whether there is a hypervisor below."""
    flags = next((x for x in (machine.read("/proc/cpuinfo") or "").splitlines() if x.startswith("flags")), "")
    if "hypervisor" in flags.split():
        name = machine.read("/sys/class/dmi/id/product_name")
        yield care(
            "virtual machine",
            name or "yes",
            "clocks and neighbours are out of sight; differences of a few percent come and go",
            "compare within one run only, and repeat it",
        )
    else:
        yield fine("virtual machine", "no")


def memory(machine: Machine) -> Iterator[Finding]:
    """Memory that is left, to the machine and to the container."""
    available, total = cgroup.memory(*machine.load.memory, read=machine.read)
    what = f"{units.size(available)} of {units.size(total)} free"
    if available < LITTLE:
        yield bad("memory", what, "the system takes pages away or ends the process", "end other programs")
    else:
        yield fine("memory", what)


def swap(machine: Machine) -> Iterator[Finding]:
    """Memory that was moved to the disk."""
    used, total = machine.load.swap
    if used > 0.01 * max(total, 1):
        yield care(
            "swap",
            f"{units.size(used)} of {units.size(total)} in use",
            "a page that is fetched from the disk takes a thousand times as long",
            "sudo swapoff -a && sudo swapon -a, with enough free memory",
        )
    else:
        yield fine("swap", "not in use" if total else "none")


def _quota(machine: Machine) -> float | None:
    """Return the processors that a control group allows; None where it sets no limit."""
    second = (machine.read(f"{cgroup.FOLDER}/cpu.max") or "").split()
    first = [machine.read(f"{cgroup.FOLDER}/cpu/cpu.cfs_{name}_us") for name in ("quota", "period")]
    pair = second if len(second) == 2 else first
    limit, period = (_int(text) for text in pair)
    return limit / period if limit and limit > 0 and period else None


def _stopped(machine: Machine) -> int:
    """Return how often the control group was stopped because its share was used up."""
    text = machine.read(f"{cgroup.FOLDER}/cpu.stat") or machine.read(f"{cgroup.FOLDER}/cpu/cpu.stat") or ""
    found = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) >= 2)
    return _int(found.get("nr_throttled")) or 0


def _int(text: str | None) -> int | None:
    try:
        return int(text or "")
    except ValueError:
        return None
