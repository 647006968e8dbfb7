"""The page, its figures and the exports: made-up records in, files and text out."""

import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import testbed.__main__ as command_line
from testbed.records import STATUSES, Record, RecordFile
from testbed.report import page
from testbed.report.draw import INK, round_numbers
from testbed.report.export import FORMATS
from testbed.report.runs import Run
from tests.made_up import MANY, SIZES, record

HOSTILE = "<script>alert('&')</script>"
OLD = """{"backend": "vmap", "status": "ok", "problem": {"model": "mlp"}, "timing": {"median_s": 0.1}, "gone": 1}
{"backend": "naive", "status": "oom", "quantity": "grads"}
{"backend": "cut off", "sta"""


def text_of(records: list[Record], folder: Path) -> str:
    return page.write_page(records, folder).read_text(encoding="utf-8")


def leave(folder: Path, records: list[Record]) -> Path:
    """Leave a run's folder."""
    folder.mkdir(parents=True)
    for one in records:
        RecordFile(folder / "results.jsonl").append(one)
    return folder


class TestPage:
    def test_is_one_file_that_asks_for_nothing(self, tmp_path: Path) -> None:
        text = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text_of(MANY, tmp_path))
        assert not re.findall(r"(?:https?:)?//\w+\.\w+", text)
        assert {
            s for s in re.findall(r'(?:src|href)="([^"]*)"', text) if not s.startswith(("#", "figures/", "data:"))
        } == set()

    def test_verdict_comes_first(self, tmp_path: Path) -> None:
        text = text_of(MANY, tmp_path)
        assert "vmap is the cheapest right backend: 100 ms, 2.00 ordinary steps; 2.00 times as fast as naive" in text
        assert text.index("vmap is the cheapest") < text.index('<table id="table">') < text.index("<figure")

    @pytest.mark.parametrize("status", STATUSES)
    def test_no_cell_disappears(self, status: str, tmp_path: Path) -> None:
        text = text_of([record("mine", status=status)], tmp_path)
        assert re.search(rf'<tr class="{status}".*mine.*{status}', text)

    @pytest.mark.parametrize(
        ("records", "judgement"),
        [
            ([record()], "Nothing is wrong: every backend that ran agrees with the truth."),
            ([record(), record("b", status="disagrees")], "1 cell is wrong."),
            (MANY, "2 cells are wrong; 4 cells failed."),
            ([record(), record("b", status="interrupted")], "The run was interrupted: it is partial."),
            ([record(status="unsupported")], "No backend ran to its end."),
        ],
    )
    def test_says_whether_anything_is_wrong(self, records: list[Record], judgement: str, tmp_path: Path) -> None:
        assert judgement in text_of(records, tmp_path)

    def test_says_where_nobody_can_be_told_from_the_best(self, tmp_path: Path) -> None:
        assert "twin: no difference beyond the noise" in text_of([record(), record("twin", 0.1001)], tmp_path)

    def test_says_where_nothing_was_timed(self, tmp_path: Path) -> None:
        made = [record(timing={}), record("b", status="unsupported")]
        assert "1 of 2 cells agree with the truth; nothing was timed." in text_of(made, tmp_path)

    def test_texts_are_escaped(self, tmp_path: Path) -> None:
        made = [record(HOSTILE), record("b", status="error", reason=HOSTILE)]
        assert HOSTILE not in text_of(made, tmp_path)

    @pytest.mark.parametrize("name", ["a$\\frac$", "_hidden", "名", "x" * 200, "a\nb"])
    def test_any_name_can_be_drawn(self, name: str, tmp_path: Path) -> None:
        assert f'aria-label="Median time of a call: {name} 100 ms' in text_of([record(name)], tmp_path)

    def test_ids_are_unique(self, tmp_path: Path) -> None:
        ids = re.findall(r'\bid="([^"]*)"', text_of([*MANY, *SIZES, record(quantity="norms")], tmp_path))
        assert len(ids) == len(set(ids))

    def test_records_of_another_version(self, tmp_path: Path) -> None:
        (tmp_path / "results.jsonl").write_text(OLD, encoding="utf-8")
        assert command_line.main(["report", str(tmp_path)]) == 0
        assert "vmap is the cheapest right backend: 100 ms." in (tmp_path / "report.html").read_text(encoding="utf-8")

    def test_records_that_say_little(self, tmp_path: Path) -> None:
        assert "vmap" in text_of([replace(record(), problem={}, environment={}, memory={}, phases={})], tmp_path)

    def test_a_cell_that_was_run_again_counts_once(self, tmp_path: Path) -> None:
        folder = leave(tmp_path / "run", [record(status="oom"), record()])
        assert command_line.main(["report", str(folder)]) == 0
        assert "oom:" not in (folder / "report.html").read_text(encoding="utf-8")

    def test_runs_stand_side_by_side(self, tmp_path: Path) -> None:
        folders = [
            leave(tmp_path / name / "run", [record("naive", 0.2), record(median=t)])
            for name, t in (("a", 0.1), ("b", 0.3))
        ]
        assert command_line.main(["report", *map(str, folders), "--out", str(tmp_path / "both")]) == 0
        text = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
        assert "vmap in 1" in text or "naive in 1" in text
        assert re.search(r"<th scope=\"row\">vmap</th><td[^>]*>100 ms · 2.00×</td><td[^>]*>300 ms · 6.00×</td>", text)

    def test_a_page_that_fails_does_not_fail_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(page, "figures", lambda rows: 1 / 0)
        page.draw_page(MANY, tmp_path)
        assert capsys.readouterr().out.startswith("no report: ZeroDivisionError: division by zero")


class TestFigures:
    def test_each_has_files_words_and_data(self, tmp_path: Path) -> None:
        text = text_of(SIZES, tmp_path)
        names = re.findall(r'<figure id="([^"]*)"', text)
        assert names == ["time", "scaling", "errors", "phases"]
        assert sorted(f.name for f in (tmp_path / "figures").iterdir()) == sorted(
            f"{n}.{e}" for n in names for e in ("png", "svg")
        )
        assert len(re.findall(r'<svg role="img" aria-label="[^"]{40,}"', text)) == len(names)
        assert text.count("<summary>The data</summary>") == len(names)

    def test_several_runs_make_a_figure_of_their_own(self, tmp_path: Path) -> None:
        page.write_pages([Run("a", (record(),)), Run("b", (record(median=0.3),))], tmp_path)
        text = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert 'aria-label="Median time of a call: vmap: 100 ms in a, 300 ms in b;' in text
        assert (tmp_path / "figures" / "runs.svg").exists()

    def test_only_sizes_make_a_scaling_figure(self, tmp_path: Path) -> None:
        assert '<figure id="scaling"' not in text_of(MANY, tmp_path)

    def test_text_follows_the_page_and_is_black_in_the_file(self, tmp_path: Path) -> None:
        drawn = "".join(re.findall(r"<svg.*?</svg>", text_of(MANY, tmp_path), flags=re.DOTALL))
        assert INK not in drawn
        assert "currentColor" in drawn
        assert INK in (tmp_path / "figures" / "time.svg").read_text(encoding="utf-8")

    def test_time_names_the_lines_and_what_has_no_time(self, tmp_path: Path) -> None:
        (alt,) = re.findall(r'aria-label="(Median time[^"]*)"', text_of(MANY, tmp_path))
        assert "ordinary step 50 ms; limit 10 ms" in alt
        assert "b_timeout has no time (timeout)" in alt

    def test_errors_name_ill_conditioned_samples(self, tmp_path: Path) -> None:
        assert "vmap at most 4.0e-07, ill-conditioned: 1" in text_of(MANY, tmp_path)

    def test_figures_of_cells_that_are_gone_are_removed(self, tmp_path: Path) -> None:
        text_of(SIZES, tmp_path)
        text_of(MANY, tmp_path)
        assert not (tmp_path / "figures" / "scaling.png").exists()

    @pytest.mark.parametrize(("low", "high"), [(1e-9, 1.0), (0.9, 1.1), (0.02, 0.03), (0.1, 0.1001), (5, 6000)])
    def test_round_numbers_lie_between(self, low: float, high: float) -> None:
        found = round_numbers(low, high)
        assert all(low <= x <= high for x in found)
        assert len(found) <= 5


class TestExport:
    @pytest.mark.parametrize("name", ["md", "csv", "latex"])
    def test_holds_every_cell(self, name: str) -> None:
        text = FORMATS[name]([Run("run", tuple(MANY))]).replace("\\", "")
        assert all(f"{r.backend}" in text and r.status in text for r in MANY)

    def test_csv_is_in_seconds_and_bytes(self) -> None:
        first, second, *_ = csv.DictReader(io.StringIO(FORMATS["csv"]([Run("run", tuple(MANY))])))
        assert (second["backend"], second["median_s"], second["peak_bytes"]) == ("vmap", "0.1", "4000")
        assert first["run"] == "run"

    def test_latex_escapes(self) -> None:
        text = FORMATS["latex"]([Run("run", (record("50%_a&b"),))])
        assert r"50\%\_a\&b & ok * & native & 100 ms $\pm$3 \%" in text

    def test_pytest_benchmark_reads_it(self, tmp_path: Path) -> None:
        pytest.importorskip("pytest_benchmark")
        file = tmp_path / "run.json"
        file.write_text(FORMATS["pytest-benchmark"]([Run("run", tuple(MANY))]), encoding="utf-8")
        assert [b["stats"]["median"] for b in json.loads(file.read_text())["benchmarks"]] == [0.2, 0.1]
        command = [sys.executable, "-m", "pytest_benchmark", "compare", str(file), "--csv", str(tmp_path / "out.csv")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        assert "grads[vmap-mlp, random, nll, float32, N=4]" in done.stdout


class TestMistakes:
    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("nowhere", "nowhere: there is no such file or folder"),
            (".", ".: holds no results.jsonl, so it is no run's folder"),
            ("empty.jsonl", "empty.jsonl: holds no record"),
            ("text.txt", "text.txt: line 1 is no record; this should be a run's results.jsonl"),
            ("list.jsonl", "list.jsonl: line 1 is no record; this should be a run's results.jsonl"),
        ],
    )
    def test_is_one_line(
        self,
        path: str,
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name, text in {"empty.jsonl": "", "text.txt": "hello\n", "list.jsonl": '[1]\n{"status": "ok"}\n'}.items():
            Path(name).write_text(text, encoding="utf-8")
        assert command_line.main(["report", path]) == 2
        assert capsys.readouterr().err == f"testbed: error: {message}\n"
