"""The conformance matrix as text and as a table: made-up records in, lines out."""

from dataclasses import replace
from pathlib import Path

from testbed.conformance import capabilities
from testbed.conformance.report import WIDTH, counts, details, matrix, report, tally
from testbed.records import Record


def cell(status: str, label: str = "b", layer: str = "Linear", case: str = "", unguarded: str = "") -> Record:
    """Return a made-up record."""
    more = (
        {"unguarded": {"status": unguarded, "diagnosis": "every gradient is zero", "silent": True}} if unguarded else {}
    )
    problem = {"case": case or layer, "layer": layer, "option": ""}
    return Record("", "", problem, label, {}, "grads", status, "why" * (status != "ok"), more, "", {}, {}, {}, {})


def test_a_cell_of_the_matrix_says_the_worst() -> None:
    ok, refused, wrong, error = (cell(s) for s in ("ok", "unsupported", "nonfinite", "crash"))
    found = [str(tally(some)) for some in ([ok] * 3, [ok, refused], [refused], [ok, error], [ok, wrong, error])]
    assert found == ["3", "1+1r", "1r", "1 error", "1 wrong!"]
    assert str(tally([cell("unavailable")] * 2)) == "2 absent"


def test_saved_silent_and_needless_are_counted() -> None:
    records = [cell("unsupported", unguarded=s) for s in ("ok", "disagrees", "unsupported")] + [cell("ok")]
    t = tally(records)
    assert (t.saved, t.silent, t.needless) == (1, 1, 1)
    assert counts(records)[1].split() == ["b", "1", "3", "1", "1", "1", "0", "0"]


def test_any_number_of_backends_fits_the_width() -> None:
    records = [
        cell("unsupported" if i == j else "ok", f"backend_of_mine_{i}", f"Layer{'WithALongName' * 3}{j}")
        for i in range(15)
        for j in range(15)
    ]
    text = report(records)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(f"backend_of_mine_{i}" in text for i in range(15))


def test_columns_that_do_the_same_are_shared_by_variants_of_one_backend_only() -> None:
    one = cell("ok", "a")
    same, other = replace(one, options={"mode": "x"}), replace(one, backend="c")
    lines = matrix([one, same, other])
    assert lines[0].split() == ["a", "c"]
    assert lines[-1] == "a stands for a(mode=x) too"


def test_details_are_of_wrong_cells_and_of_refusals_if_wanted() -> None:
    records = [cell("ok"), cell("disagrees", case="Linear(bias=False)"), cell("unsupported", unguarded="disagrees")]
    assert details(records) == ["wrong: b, grads: Linear(bias=False)", "    why"]
    assert details(records, verbose=True)[-1] == "    why [unguarded: every gradient is zero]"


def test_the_table_is_written_between_its_markers(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"above\n{capabilities.BEGIN}\nold\n{capabilities.END}\nbelow\n")
    capabilities.write(file, "| new |")
    assert file.read_text() == f"above\n{capabilities.BEGIN}\n| new |\n{capabilities.END}\nbelow\n"
    assert capabilities.read(file) == "| new |"
