"""A finding: what was looked at, what was found, what it does to the numbers, how to mend it."""

from dataclasses import dataclass
from enum import Enum


class Grade(Enum):
    """How much a finding matters; the value is the mark it is printed with."""

    BAD = "✗"  # numbers measured now should not be trusted
    CARE = "!"  # it may matter: for some numbers, or when comparing with another machine
    FINE = "✓"
    UNKNOWN = "?"


@dataclass(frozen=True)
class Finding:
    """A finding.

    Attributes:
        grade: How much it matters.
        topic: What was looked at.
        what: What was found.
        effect: What it does to the numbers.
        mend: A command or a deed.
    """

    grade: Grade
    topic: str
    what: str
    effect: str = ""
    mend: str = ""


def bad(topic: str, what: str, effect: str, mend: str) -> Finding:
    """Return a finding that spoils numbers."""
    return Finding(Grade.BAD, topic, what, effect, mend)


def care(topic: str, what: str, effect: str, mend: str = "") -> Finding:
    """Return a finding that may matter."""
    return Finding(Grade.CARE, topic, what, effect, mend)


def fine(topic: str, what: str) -> Finding:
    """Return a finding that is as it should be."""
    return Finding(Grade.FINE, topic, what)


def unknown(topic: str, what: str) -> Finding:
    """Return that something cannot be found out here."""
    return Finding(Grade.UNKNOWN, topic, what)
