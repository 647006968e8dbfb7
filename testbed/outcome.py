"""What became of a cell: its status, and the reason that an exception, a finding or a warning gives for it."""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from backends.base import Unavailable, Unsupported, first_line, first_line_of, place_of
from backends.shortage import lack_of_memory
from testbed.referee import Finding


@dataclass
class Outcome:
    """What is known of a cell so far, as the fields of its record."""

    status: str = "ok"
    reason: str = ""
    diagnosis: str = ""
    agreement: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    traceback: str = ""

    @property
    def warnings(self) -> list[str]:
        """The library's warnings, each once."""
        return self.phases.setdefault("warnings", [])  # type: ignore[no-any-return]

    def take(self, question: str, finding: Finding) -> None:
        """Take the answer to a question."""
        self.status, self.reason, self.diagnosis = finding.status, finding.diagnosis, finding.diagnosis
        if finding.agreement:
            self.agreement[question] = asdict(finding.agreement)

    def fail(self, error: BaseException) -> None:
        """Take the status and the reason from an exception."""
        self.status, self.reason = status_of(error)
        self.diagnosis = self.reason if self.status == "disagrees" else self.diagnosis
        self.traceback = "".join(traceback.format_exception(error)) if self.status == "error" else ""


class Broken(Exception):
    """A backend breaks its contract: what it did, in one line."""


def status_of(error: BaseException) -> tuple[str, str]:
    """Return the status and the one-line reason that an exception stands for."""
    if lack := lack_of_memory(error):
        return "oom", first_line(lack)
    if isinstance(error, Unsupported):
        return "unsupported", first_line(error)
    if isinstance(error, Broken):
        return "disagrees", first_line(error)
    if isinstance(error, Unavailable):
        return "unavailable", first_line(error)
    return "error", f"{type(error).__name__}: {first_line(error)} ({place_of(error)})"


@contextmanager
def listening(outcome: Outcome | None = None) -> Iterator[None]:
    """Keep a library's warnings out of the output; each is written down once, its first sentence."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for warning in heard if outcome else ():
                sentence = first_line_of(str(warning.message)).split(". ")[0]
                if outcome and sentence not in outcome.warnings:
                    outcome.warnings.append(sentence)
