"""The capability table of `backends/README.md`, made from the records of a guarded sweep of `grads`."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from backends import backend_class
from testbed.conformance.report import Tally, columns, row_of, tally, unguarded_status
from testbed.records import Record

BEGIN, END = "<!-- capabilities -->", "<!-- /capabilities -->"
PLACE = re.compile(  # a refusal's beginning: `path` (Type(options)), with brackets three deep, or a parameter's name
    r"(\S+ with )?(parameter )?`[^`]*`( \((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))?:? *"
)
LEGEND = """\
Cases of the conformance matrix, `grads` in float64. **30+4r (2)**: 30 right, 4 refused, of which the library would get
2 wrong without a word. Made by `python -m testbed conformance --write-table FILE` with"""


def capabilities(records: Sequence[Record]) -> str:
    """Return the table and its footnotes as Markdown."""
    made = ", ".join(f"{name} {version}" for name, version in libraries(records).items())
    shared = columns(records)
    names = list(dict.fromkeys(row_of(r) for r in records))
    lines = [
        f"{LEGEND} {made}.",
        "",
        "| " + " | ".join(["", *(_header(label, others) for label, others in shared.items())]) + " |",
        "|---|" + "---:|" * len(shared),
    ]
    for name in [*names, ""]:
        mine = [r for r in records if name in (row_of(r), "")]
        cells = (_cell(tally(r for r in mine if r.label == label)) for label in shared)
        lines.append(f"| {' | '.join([name or '**all**', *cells])} |")
    return "\n".join([*lines, "", *_footnotes(records, shared)])


def libraries(records: Sequence[Record]) -> dict[str, str]:
    """Return the versions of what the records depend on: torch and the backends' libraries."""
    needed = {package for r in records for package in backend_class(r.backend).requires.values()}
    versions: dict[str, str] = records[0].environment["versions"]
    return {name: version for name, version in versions.items() if name in {"torch", *needed}}


def rows(text: str) -> dict[str, str]:
    """Return the lines of a table as `capabilities` made it, by the row's name."""
    found = (line for line in text.splitlines() if line.startswith("| ") and line.count("|") > 2)
    return {line.split("|")[1].strip(): line for line in found}


def has_place(text: str) -> bool:
    """Return whether a file's text has both markers, in their order."""
    return END in text.partition(BEGIN)[2]


def write(file: Path, table: str) -> None:
    """Put the table between the markers of a file, which has both; see `has_place`."""
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    file.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def read(file: Path) -> str:
    """Return the table between the markers of a file."""
    return file.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def _header(label: str, others: Sequence[str]) -> str:
    return f"`{label}`" + (" *" if len(others) > 1 else "")


def _cell(t: Tally) -> str:
    return f"{t} ({t.silent})" if t.silent and not t.kinds["wrong"] else str(t)


def _footnotes(records: Iterable[Record], shared: dict[str, list[str]]) -> list[str]:
    """Return what the raw libraries get wrong without a word, by the reason that their backends refuse it with."""
    lines = [f"\\* the same as {', '.join(f'`{o}`' for o in others[1:])}" for others in shared.values() if others[1:]]
    kinds: dict[str, dict[str, list[str]]] = {}
    for r in records:
        if unguarded_status(r) == "wrong" and r.agreement["unguarded"]["silent"]:
            kinds.setdefault(_kind(r.reason), {}).setdefault(r.label, []).append(r.problem["case"])
    lines += ["", "What the libraries would return wrong, in the right form, if their backends did not refuse it:", ""]
    for kind, cases in sorted(kinds.items(), key=lambda item: -sum(map(len, item[1].values()))):
        first = next(iter(cases.values()))[0]
        who = ", ".join(f"`{label}` {len(found)}" for label, found in cases.items())
        lines.append(f'- {kind}, as in "{first}": {who}')
    return lines


def _kind(reason: str) -> str:
    """Return what is left of a refusal without its place and numbers, so that one rule's refusals are one kind."""
    reason = re.sub(r"module calls \(.*?\);", "module calls;", PLACE.sub("", reason, count=1))
    return re.sub(r"\[[^\]]*\]|\b\d+\b", "…", reason)
