"""Reports: one table a problem and quantity, what is the same said once, prices in words, and who wins where."""

import math
from dataclasses import replace
from typing import Any

import pytest

from backends.base import QUANTITIES
from testbed.records import Record
from testbed.report import Report
from testbed.report.prices import COST, prices, sentence
from testbed.report.rows import problem_of

PROBLEM = {"model": "mlp", "data": "random", "loss": "nll", "batch_size": 4, "seed": 0, "train_steps": 0}
PROBLEM |= {"dtype": "float32", "device": "cpu", "tf32": False}
ENVIRONMENT = {"device": "cpu", "processor": "a processor", "threads": 2}
STEP = 0.01  # seconds of an ordinary step


def record(backend: str, price: float | None, quantity: str = "grads", native: bool = True, **changes: Any) -> Record:
    """Return a record of a backend with a price in steps; without one it is a refusal."""
    timing: dict[str, Any] = {"native": native}
    status = "unsupported"
    if price is not None:
        status, seconds = "ok", [price * STEP * noise for noise in (0.99, 1, 1.01)]
        timing |= {"median_s": price * STEP, "p5_s": seconds[0], "p95_s": seconds[2], "samples_s": seconds}
        timing |= {"ratio": None, "ratio_ci": None, "verdict": None, "baseline": "naive", "floor": 0.05, "rounds": 3}
        timing |= {"stopped_by": "rounds", "ordinary": {"ratio": price, "median_s": STEP, "p5_s": STEP, "p95_s": STEP}}
    options = {"chunk_size": 64} if backend == "chunked" else {}
    return Record(
        "", "e", {**PROBLEM, **changes}, backend, options, quantity, status, "" if price else "a reason", {"rule": "x"},
        "", {}, timing, {}, ENVIRONMENT,
    )  # fmt: skip


def lines(*records: Record) -> list[str]:
    return [line.rstrip() for line in str(Report(records)).splitlines()]


def test_what_disturbed_the_rounds_is_said_once() -> None:
    busy = {**ENVIRONMENT, "disturbances": ["other programs used 0.9 of 2 cores"]}
    records = [replace(record(b, 2.0), environment=busy) for b in ("naive", "vmap")]
    assert str(Report(records)).count("• While the rounds ran: other programs used 0.9 of 2 cores.") == 1


def test_the_floor_is_said_as_a_share_and_not_as_its_logarithm() -> None:
    made = record("naive", 5)
    doubled = replace(made, timing={**made.timing, "floor": math.log(2)})
    assert "naive against itself was off by up to 100.0 %: smaller differences are not called." in text(doubled)


def on_gpu(backend: str, price: float, host: float, **options: Any) -> Record:
    """Return a record of a GPU, on which the host takes a share of a call's time, as it does of the ordinary step's."""
    made = record(backend, price)
    timing = {**made.timing, "host_s": host * made.timing["median_s"]}
    timing["ordinary"] = {**timing["ordinary"], "host_s": host * STEP}
    gpu = {**ENVIRONMENT, "device": "cuda:0"}
    return replace(made, timing=timing, options=options, environment=gpu, memory={"peak_bytes": 0})


def test_what_waits_for_the_host_is_said_of_the_ordinary_step_too() -> None:
    assert "• Launch-bound (the GPU waits for the host): the ordinary step, naive, vmap." in text(
        on_gpu("naive", 3, 0.95), on_gpu("vmap", 2, 0.95)
    )
    assert "Launch-bound" not in text(on_gpu("naive", 3, 0.5), on_gpu("vmap", 2, 0.5))


@pytest.mark.parametrize(("peak", "said"), [(0.9, True), (1.1, False)])
def test_a_limit_that_the_step_beats_is_none(peak: float, said: bool) -> None:
    made = record("naive", 3)
    limit = {"flops": 100, "peak_flops": peak * 100 / STEP, "seconds": STEP / peak, "bytes": 1, "bandwidth": 1e9}
    found = text(replace(made, timing={**made.timing, "limit": limit}))
    assert ("• The limit is none here: something slowed the device down" in found) == said


@pytest.mark.parametrize(("share", "said"), [(0.5, True), (0.9, False), (2.0, False)])
def test_what_is_faster_than_the_limit_is_questioned(share: float, said: bool) -> None:
    made = record("naive", 3)
    limit = {"flops": 0, "peak_flops": 1.0, "seconds": made.timing["median_s"] / share, "bytes": 1, "bandwidth": 1e9}
    found = text(replace(made, timing={**made.timing, "limit": limit}))
    assert ("• naive: less time than the limit allows" in found) == said


def test_a_graphs_memory_is_not_in_its_peak() -> None:
    said = "• vmap(cuda_graph=True): peak leaves out what a CUDA graph holds from call to call"
    assert said in text(on_gpu("naive", 3, 0.5), on_gpu("vmap", 2, 0.1, cuda_graph=True))
    assert "CUDA graph" not in text(on_gpu("naive", 3, 0.5), on_gpu("vmap", 2, 0.1))


def test_problems_that_differ_in_tf32_are_drawn_apart() -> None:
    exact, rounded = (record("naive", 3, tf32=tf32) for tf32 in (False, True))
    assert problem_of(rounded) == f"{problem_of(exact)}, TF32"


def summary(*records: Record) -> list[tuple[str, ...]]:
    return [row for table in Report(records).summary() for row in table.rows]


def text(*records: Record) -> str:
    return " ".join(str(Report(records)).split())


def test_every_row_says_native_or_derived() -> None:
    (table,) = Report([record("naive", 5), record("vmap", 3, native=False), record("opacus", None)]).tables()
    assert [row[:3] for row in table.rows[:3]] == [
        ("naive", "ok", "native"),
        ("vmap", "ok", "derived"),
        ("opacus", "unsupported", "native"),
    ]


def test_price_is_said_in_words() -> None:
    said = text(record("naive", 5, "clipped_sum(max_norm=0.1)"), record("vmap", 1.4, "clipped_sum(max_norm=0.1)"))
    assert (
        "Clipped sums (max_norm=0.1) cost 1.40 training steps with vmap, the cheapest right backend; 5.00 with naive."
    ) in said


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_every_quantity_has_words(quantity: str) -> None:
    assert quantity in COST


def test_lead_that_may_be_noise_is_said() -> None:
    found = prices([record("naive", 3), record("vmap", 3.1), record("opacus", 9)])
    assert sentence("norms", found, None).endswith("9.00 with opacus. Its lead over vmap may be noise.")
    assert sentence("norms", found, "vmap").endswith("9.00 with opacus.")


def test_many_prices_are_cut() -> None:
    found = prices([record(f"b{i}", i) for i in range(1, 9)])
    assert "5.00 with b5, more with 3 others." in sentence("norms", found, None)


def test_wrong_results_have_no_price() -> None:
    wrong = Record(**{**vars(record("vmap", 1)), "status": "disagrees"})
    assert [p.backend for p in prices([wrong, record("naive", 2), record("opacus", None)])] == ["naive"]


def test_one_problem_is_named_once_for_all_quantities() -> None:
    found = lines(record("naive", 5), record("naive", 4, "norms"))
    assert found[0] == "mlp, random, nll · N=4, float32 · a processor, 2 threads"
    assert [line for line in found if line in ("grads", "norms")] == ["grads", "norms"]
    assert sum("mlp" in line for line in found) == 2  # and in the summary


def test_several_problems_say_what_they_share_once() -> None:
    found = lines(record("naive", 5), record("naive", 5, batch_size=8), record("naive", 5, model="logistic"))
    assert found[0] == "All problems: random, nll · float32 · a processor, 2 threads"
    headings = [line.removeprefix("grads · ") for line in found if line.startswith("grads · ")]
    assert headings == ["mlp · N=4", "mlp · N=8", "logistic · N=4"]


@pytest.mark.parametrize(
    ("change", "headings"),
    [
        ({"seed": 1}, ["seed 0", "seed 1"]),
        ({"train_steps": 5}, ["untrained", "trained 5 steps"]),
        ({"tf32": True}, ["no TF32", "TF32"]),
        ({"dtype": "bfloat16"}, ["float32", "bfloat16"]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_problems_are_told_apart_by_what_differs(change: dict[str, Any], headings: list[str]) -> None:
    tables = Report([record("naive", 5), record("naive", 5, **change)]).tables()
    assert [table.problem for table in tables] == headings


def test_note_on_all_quantities_of_a_problem_is_printed_once() -> None:
    said = text(record("naive", 5), record("vmap", None), record("naive", 5, "norms"), record("vmap", None, "norms"))
    assert said.count("vmap: unsupported: a reason") == 1


def test_no_summary_of_one_table() -> None:
    assert Report([record("naive", 5), record("vmap", 3)]).summary() == []


def test_summary_names_the_cheapest_and_the_next() -> None:
    grads = [record("naive", 5), record("vmap", 3), record("opacus", 4)]
    assert summary(*grads, record("naive", 6, "norms"), record("vmap", None, "norms")) == [
        ("grads", "4", "vmap 3.00", "opacus 4.00", "5.00"),
        ("norms", "4", "naive 6.00", "–", "6.00"),
    ]


def test_summary_says_how_the_winner_changes_with_the_batch_size() -> None:
    sizes = {1: (1, 2), 4: (3, 2.5), 16: (4, 3), 64: (None, None)}
    records = [
        r for n, (a, b) in sizes.items() for r in (record("naive", a, batch_size=n), record("vmap", b, batch_size=n))
    ]
    assert summary(*records) == [
        ("grads", "1", "naive 1.00", "vmap 2.00", "1.00"),
        ("", "4…16", "vmap 2.50…3.00", "naive 3.00…4.00", "3.00…4.00"),
        ("", "64", "none right", "", ""),
    ]


def test_summary_of_what_was_stopped_does_not_say_that_none_is_right() -> None:
    stopped = [replace(record(b, None, "norms"), status="interrupted") for b in ("naive", "vmap")]
    assert summary(record("naive", 5), *stopped)[1] == ("norms", "4", "interrupted", "", "")


def test_summary_marks_a_lead_that_may_be_noise() -> None:
    assert summary(record("naive", 3), record("vmap", 3.05), record("vmap", 3, "norms"))[0][3] == "≈ vmap 3.05"
    assert "≈: the lead of the cheapest over it may be noise." in text(
        record("naive", 3), record("vmap", 3.05), record("vmap", 3, "norms")
    )


def test_summary_has_a_table_for_each_kind_of_problem() -> None:
    records = [record("naive", 5, model=model, batch_size=n) for model in ("mlp", "logistic") for n in (1, 4)]
    assert [(table.problem, len(table.rows)) for table in Report(records).summary()] == [("mlp", 1), ("logistic", 1)]


def test_all_fits_80_columns() -> None:
    names = ("expanded_weights", "chunked", "naive")
    quantities = ("clipped_sum(max_norm=0.1)", "grads")
    records = [record(name, 12.3 + n, q, batch_size=n) for n in (1, 1024) for q in quantities for name in names]
    refused = [record("a_backend_with_a_long_name", None, q, batch_size=1) for q in quantities]
    assert max(map(len, lines(*records, *refused))) <= 80
    assert any(line.startswith("expanded_weights ok") for line in lines(*records, *refused))


def test_without_a_baseline_there_is_no_column_for_it() -> None:
    r = record("vmap", 3)
    r.timing["baseline"] = None
    (table,) = Report([r]).tables()
    assert table.header == ("backend", "status", "way", "median", "× step", "peak", "first")
    assert {len(row) for row in table.rows} == {7}


def test_html_has_every_table_and_the_summary() -> None:
    html = Report([record("naive", 5), record("naive", 5, batch_size=8)])._repr_html_()
    assert html.count("<table>") == 3
    assert "<caption>Who wins where · mlp, random" in html


def test_record_of_an_earlier_version_is_shown() -> None:
    bare = Record("", "e", {}, "vmap", {}, "grads", "ok", "", {}, "", {}, {"median_s": 1.0}, {}, ENVIRONMENT)
    assert "vmap ok – 1 s ±0 %" in text(bare, Record(**{**vars(bare), "quantity": "norms"}))


def test_warnings_that_differ_in_numbers_only_are_one_with_a_count() -> None:
    r = record("vmap", 2)
    r.phases["warnings"] = ["process 12 still runs", "another", "process 345 still runs"]
    said = " ".join(str(Report([r])).split())
    assert "vmap warns: process 12 still runs (2 such, with other numbers)." in said
    assert "vmap warns: another." in said
    assert "345" not in said
