"""Numbers as people read them."""

import math


def seconds(value: float | None) -> str:
    """Return a time with three digits and its unit: 343 ms."""
    if value is None:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale:
            return f"{_digits(value / scale)} {unit}"
    return f"{value / 1e-9:.0f} ns"


def size(value: float | None) -> str:
    """Return a number of bytes with its unit: 302 MB."""
    if value is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{_digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def ratio(value: float | None) -> str:
    """Return a ratio with three digits; with two places below ten, and two digits below a tenth."""
    if value is None:
        return "–"
    if 0 < value < 0.095:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 10 else _digits(value)


def interval(pair: list[float] | None) -> str:
    """Return an interval in brackets, or nothing."""
    return f" [{ratio(pair[0])}–{ratio(pair[1])}]" if pair else ""


def spread(median: float, low: float, high: float) -> str:
    """Return half the distance between p5 and p95, in percent of the median."""
    return f"±{50 * (high - low) / median:.0f} %"


def noise(floor: float) -> str:
    """Return an A/A floor, which records hold as |log| of a ratio, as the part by which that ratio is off from 1."""
    return f"{100 * math.expm1(floor):.1f} %"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"
