"""Runs → text for a pull request (Markdown), a paper (LaTeX), a spreadsheet (CSV), or `pytest-benchmark compare`."""

import csv
import io
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from testbed.report import columns
from testbed.report.rows import Row, rows_of
from testbed.report.runs import Run
from testbed.report.table import Report, Table

PYTEST_BENCHMARK = "4.0.0"  # the version whose format is written; later ones read it
LATEX = {c: f"\\{c}" for c in "#$%&_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "×": r"$\times$",
    "±": r"$\pm$",
    "–": "--",
    "µ": r"$\mu$",
    "·": r"$\cdot$",
}


def markdown(runs: Sequence[Run]) -> str:
    """Return the tables as Markdown, each with its notes."""

    def table(t: Table) -> str:
        lines = [t.header, [":--" if i < 3 else "--:" for i in range(len(t.header))], *t.rows]
        grid = "\n".join("| " + " | ".join(map(_markdown, line)) + " |" for line in lines)
        notes = "\n".join(f"- {_markdown(note)}" for note in t.notes)
        return f"**{_markdown(t.title)}**\n\n{grid}\n\n{notes}"

    return "\n\n".join(map(table, _tables(runs)))


def latex(runs: Sequence[Run]) -> str:
    r"""Return the tables as LaTeX, for `\usepackage{booktabs}`; the notes are comments."""

    def table(t: Table) -> str:
        lines = [" & ".join(map(_latex, row)) + r" \\" for row in t.rows]
        return "\n".join(
            [
                *(f"% {note}" for note in t.notes),
                r"\begin{table}",
                r"  \centering",
                rf"  \caption{{{_latex(t.title)}}}",
                rf"  \begin{{tabular}}{{{'l' * 3}{'r' * (len(t.header) - 3)}}}",
                r"    \toprule",
                f"    {' & '.join(map(_latex, t.header))} \\\\",
                r"    \midrule",
                *(f"    {line}" for line in lines),
                r"    \bottomrule",
                r"  \end{tabular}",
                r"\end{table}",
            ]
        )

    return "\n\n".join(["% needs \\usepackage{booktabs}", *map(table, _tables(runs))])


def comma_separated(runs: Sequence[Run]) -> str:
    """Return all rows as CSV, in seconds and bytes; what is not known is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([c.key for c in columns.CSV])
    for run in runs:
        for row in rows_of(run):
            writer.writerow(["" if (value := c.value(row)) is None else value for c in columns.CSV])
    return out.getvalue().rstrip("\n")


def pytest_benchmark(runs: Sequence[Run]) -> str:
    """Return the right, timed cells as pytest-benchmark writes them, for `pytest-benchmark compare FILE`."""
    rows = [row for run in runs for row in rows_of(run) if row.status == "ok" and row.samples]
    several = len(runs) > 1
    env = next((record.environment for run in runs for record in run.records), {})
    return json.dumps(
        {
            "machine_info": {
                "node": platform.node(),
                "processor": env.get("processor", ""),
                "machine": platform.machine(),
                "python_version": env.get("python", ""),
                "system": platform.system(),
                "cpu": {"brand_raw": env.get("processor", "")},
            },
            "commit_info": {"id": env.get("commit"), "dirty": env.get("dirty", False)},
            "benchmarks": [_benchmark(row, several) for row in rows],
            "datetime": datetime.now(UTC).isoformat(),
            "version": PYTEST_BENCHMARK,
        },
        indent=1,
        ensure_ascii=False,
    )


def _benchmark(row: Row, several: bool) -> dict[str, Any]:
    batch = f", N={row.batch}" if row.batch is not None else ""
    name = f"{row.quantity}[{f'{row.run}-' if several else ''}{row.backend}-{row.problem}{batch}]"
    return {
        "group": f"{row.quantity} {row.problem}{batch}",
        "name": name,
        "fullname": name,
        "params": None,
        "param": None,
        "extra_info": {"run": row.run, "peak_bytes": row.peak, "ratio_to_step": row.step},
        "options": {"disable_gc": False, "timer": "perf_counter", "min_rounds": 2, "warmup": True},
        "stats": _stats(row.samples),
    }


def _stats(samples: Sequence[float]) -> dict[str, Any]:
    data = np.sort(np.asarray(samples))
    q1, median, q3 = (float(q) for q in np.quantile(data, [0.25, 0.5, 0.75]))
    mean, deviation, spread = float(data.mean()), float(data.std(ddof=1)) if len(data) > 1 else 0.0, q3 - q1
    inside = data[(data >= q1 - 1.5 * spread) & (data <= q3 + 1.5 * spread)]
    beyond = int((np.abs(data - mean) > deviation).sum()), len(data) - len(inside)
    return {
        "min": float(data[0]),
        "max": float(data[-1]),
        "mean": mean,
        "stddev": deviation,
        "rounds": len(data),
        "median": median,
        "iqr": spread,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": beyond[1],
        "stddev_outliers": beyond[0],
        "outliers": f"{beyond[0]};{beyond[1]}",
        "ld15iqr": float(inside[0]),
        "hd15iqr": float(inside[-1]),
        "ops": 1 / mean,
        "total": float(data.sum()),
        "data": list(map(float, samples)),
        "iterations": 1,
    }


FORMATS: Mapping[str, Callable[[Sequence[Run]], str]] = {
    "md": markdown,
    "csv": comma_separated,
    "latex": latex,
    "pytest-benchmark": pytest_benchmark,
}


def _tables(runs: Sequence[Run]) -> list[Table]:
    """Return the tables of all runs; the titles name the run where there are several."""
    found = []
    for run in runs:
        for t in Report(run.records).tables():
            title = f"{run.name}: {t.title}" if len(runs) > 1 else t.title
            found.append(replace(t, title=title))
    return found


def _markdown(text: str) -> str:
    """Return text that Markdown shows as it stands."""
    return re.sub(r"([\\|*_<>\[\]])", r"\\\1", text)


def _latex(text: str) -> str:
    """Return text that LaTeX shows as it stands; `[` would be an option where it follows a line's end."""
    escaped = "".join(LATEX.get(c, c) for c in text)
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped
