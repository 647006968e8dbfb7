"""What the table cannot say, in plain words."""

import re
from collections import defaultdict
from collections.abc import Sequence

from testbed.records import Record
from testbed.report import units
from testbed.report.prices import prices, sentence

WHY = {"rounds": "all asked for", "precision": "the ratios are narrow enough", "max_s": "time was up"}
"""Why there were no more rounds."""

LAUNCH_BOUND = 0.9  # of the time spent in launching: the device waits for the host


POSSIBLE = 0.8  # of the limit's time: what is below has not done what the limit is made of


def notes(records: Sequence[Record]) -> list[str]:
    """Return the notes on the records of one problem and quantity."""
    on_results = [
        *_reasons(records),
        *_ill_conditioned(records),
        *_not_finite(records),
        *_unasked(records),
        *_checked(records),
    ]
    on_times = [
        *_compiled(records),
        *_launch_bound(records),
        *_graphs(records),
        *_warnings(records),
        _noise(records),
        *_disturbed(records),
        *_slow_ceilings(records),
        *_too_fast(records),
    ]
    return [note for note in [_winner(records), *on_results, *on_times] if note]


def _winner(records: Sequence[Record]) -> str:
    right = [r for r in records if r.status == "ok" and "median_s" in r.timing]
    if not right:
        if any(r.status == "interrupted" for r in records):
            return ""
        return "No backend gave a right result that could be timed."
    best = min(right, key=lambda r: r.timing["median_s"])
    base, value = best.timing.get("baseline"), best.timing.get("ratio")
    found = prices(records)
    said = [sentence(best.quantity, found, base) if found else f"Cheapest right backend: {best.label}."]
    if value and best.label != base:
        low, high = best.timing["ratio_ci"]
        speed = f"{best.label} is {units.ratio(1 / value)} times as fast as {base}{units.interval([1 / high, 1 / low])}"
        said.append(f"{speed}." if best.timing["verdict"] == "faster" else f"{speed}, which may be noise.")
    return " ".join(said)


def _reasons(records: Sequence[Record]) -> list[str]:
    refused = [r for r in records if r.status != "ok"]
    if len(refused) > 1 and len({r.reason for r in refused}) == 1:
        return [f"{', '.join(r.label for r in refused)}: {refused[0].status}: {refused[0].reason}"]
    return [f"{r.label}: {r.status}: {r.reason}" for r in refused]


def ill_conditioned(record: Record) -> tuple[int, ...]:
    """Return the ill-conditioned samples of the batch that was timed."""
    return tuple(record.agreement.get("precision", {}).get("ill_conditioned", ()))


def _ill_conditioned(records: Sequence[Record]) -> list[str]:
    backends: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for r in records:
        if r.status == "ok" and (samples := ill_conditioned(r)):
            backends[samples].append(r.label)
    return [
        f"* {', '.join(labels)}: agrees; {_samples(samples)}: near a kink (ReLU, max-pool, …), where a few roundings "
        "of the inputs move the right gradient as far as these results are off."
        for samples, labels in backends.items()
    ]


def _not_finite(records: Sequence[Record]) -> list[str]:
    found = dict.fromkeys(r.agreement.get("precision", {}).get("nonfinite") for r in records if r.status == "ok")
    return [
        f"The truth is not finite in {where}; neither are these results there. The rest was compared."
        for where in found
        if where
    ]


def _unasked(records: Sequence[Record]) -> list[str]:
    asked = [r for r in records if r.status == "ok" and r.agreement.get("rule") == "calibrated"]
    return [
        f"{r.label} has no float64 path here: whether it is the same function was not asked, only how precise it is"
        + (f" ({r.agreement['no_float64']})." if "no_float64" in r.agreement else ".")
        for r in asked
        if "same_function" not in r.agreement
    ]


def _compiled(records: Sequence[Record]) -> list[str]:
    found = []
    for r in records:
        if "compile_s" in r.phases:
            text = f"{r.label}: compiling took {units.seconds(r.phases['compile_s'])}, which its first call leaves out"
            if anew := r.phases.get("recompiles"):
                text += f"; it was compiled {anew} more time{'s' if anew > 1 else ''} while it was timed and checked"
            found.append(f"{text}.")
    return found


def _warnings(records: Sequence[Record]) -> list[str]:
    """Return each warning; those that differ in numbers only, such as that of a process, as one with a count."""
    alike: dict[tuple[str, str], list[str]] = defaultdict(list)
    for r in records:
        for warning in r.phases.get("warnings", ()):
            alike[r.label, re.sub(r"\d+", "0", warning)].append(warning)
    more = {key: f" ({len(found)} such, with other numbers)" if len(found) > 1 else "" for key, found in alike.items()}
    return [f"{label} warns: {found[0]}{more[label, form]}." for (label, form), found in alike.items()]


def _checked(records: Sequence[Record]) -> list[str]:
    found = []
    about = records[0].problem
    if "dropout" in about:
        found.append("Dropout: masks were drawn once and given to every backend as inputs.")
    asked = next((r.agreement for r in records if "checked_samples" in r.agreement), {})
    n = about.get("batch_size", 0)
    if (checked := asked.get("checked_samples", n)) < n:
        found.append(f"Agreement was checked on {checked} of {n} samples, drawn at random.")
    if asked.get("nondeterminism"):
        gap = asked["nondeterminism"]
        found.append(f"Two runs of the reference differ by {gap:.1g} of its norm: kernels here are nondeterministic.")
    return found


def _launch_bound(records: Sequence[Record]) -> list[str]:
    on_gpu = [r for r in records if str(r.environment.get("device", "")).startswith("cuda")]
    steps = [r.timing["ordinary"] for r in on_gpu if "ordinary" in r.timing]
    timed = [*[("the ordinary step", step) for step in steps[:1]], *[(r.label, r.timing) for r in on_gpu]]
    bound = [name for name, t in timed if t.get("host_s", 0) > LAUNCH_BOUND * t.get("median_s", float("inf"))]
    return [f"Launch-bound (the GPU waits for the host): {', '.join(bound)}."] if bound else []


def _graphs(records: Sequence[Record]) -> list[str]:
    graphs = [r.label for r in records if r.options.get("cuda_graph") and r.memory.get("peak_bytes") is not None]
    said = "peak leaves out what a CUDA graph holds from call to call, all that its ops need."
    return [f"{', '.join(graphs)}: {said}"] if graphs else []


def _slow_ceilings(records: Sequence[Record]) -> list[str]:
    """Say where the limit is none: the ordinary step did its operations faster than the device's measured ceiling."""
    for timing in (r.timing for r in records if r.timing.get("limit") and r.timing.get("ordinary")):
        limit, step = timing["limit"], timing["ordinary"]
        if limit.get("flops", 0) > limit.get("peak_flops", float("inf")) * step.get("median_s", float("inf")):
            return ["The limit is none here: something slowed the device down while its ceilings were measured."]
    return []


def _too_fast(records: Sequence[Record]) -> list[str]:
    """Say what took less time than is possible: what is checked is right, and what is timed may be something else."""
    limits = [(r, r.timing["limit"].get("seconds", 0)) for r in records if r.status == "ok" and r.timing.get("limit")]
    found = [r.label for r, limit in limits if r.timing["median_s"] < POSSIBLE * limit]
    if not found or _slow_ceilings(records):
        return []
    return [f"{', '.join(found)}: less time than the limit allows; does it compute all of this in every call?"]


def _disturbed(records: Sequence[Record]) -> list[str]:
    """Say what else went on while the rounds ran; the cells of a quantity share their rounds."""
    found = dict.fromkeys(said for r in records for said in r.environment.get("disturbances", ()))
    return [f"While the rounds ran: {'; '.join(found)}."] if found else []


def _noise(records: Sequence[Record]) -> str:
    timed = next((r for r in records if r.timing.get("floor") is not None), None)
    if timed is None:
        return ""
    why = WHY.get(timed.timing.get("stopped_by", ""), "time was up")
    base = timed.timing.get("baseline", "The baseline")
    return (
        f"{timed.timing.get('rounds', '?')} rounds ({why}). {base} against itself was off by up to "
        f"{units.noise(timed.timing['floor'])}: smaller differences are not called."
    )


def _samples(samples: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
    return f"{len(samples)} ill-conditioned sample{'s' if len(samples) > 1 else ''} ({shown})"
