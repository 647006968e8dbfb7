"""Sweeps: what lists stand for, what `exclude` keeps out, and runs of several problems, which lose nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

import testbed.__main__ as command_line
from testbed.config.experiment import Experiment
from testbed.config.load import load_experiment
from testbed.jobs import identities, run_experiment
from testbed.problems import ProblemError, register_model
from testbed.processes.child import Isolation
from testbed.records import Record, read_records

BASE = "data: {random: {shape: [5], classes: 3}}\nloss: nll\nbackends: [naive, vmap]\ndevice: cpu\n"
FAST = BASE + "timing: {rounds: 2, max_s: 1, warmup: 0}\n"
MODEL = "model: logistic\n"


def problems(experiment: Experiment) -> list[str]:
    return [f"{p.model} {p.batch_size} {p.dtype} {p.seed}" for p in experiment.problems]


def cells(experiment: Experiment) -> list[str]:
    return [f"{c.problem.batch_size} {c.quantity} {c.backend}" for c in experiment.chosen()]


PROBLEMS = {
    "one value": (MODEL, ["logistic 64 float32 0"]),
    "a list of one": ("model: [logistic]", ["logistic 64 float32 0"]),
    "batch sizes": (MODEL + "batch_size: [1, 4]", ["logistic 1 float32 0", "logistic 4 float32 0"]),
    "lists multiply, the last fastest": (
        "model: [logistic, mlp]\nseed: [1, 2]",
        ["logistic 64 float32 1", "logistic 64 float32 2", "mlp 64 float32 1", "mlp 64 float32 2"],
    ),
    "dtypes": (MODEL + "dtype: [float32, bfloat16]", ["logistic 64 float32 0", "logistic 64 bfloat16 0"]),
    "an option that is a list is a value": (
        "model: {mlp: {hidden: [8, 8]}}",
        ["mlp(hidden=[8, 8]) 64 float32 0"],
    ),
    "an empty list for such an option": ("model: {mlp: {hidden: []}}", ["mlp(hidden=[]) 64 float32 0"]),
    "a list of lists sweeps it": (
        "model: {mlp: {hidden: [[8], []]}}",
        ["mlp(hidden=[8]) 64 float32 0", "mlp(hidden=[]) 64 float32 0"],
    ),
    "a list sweeps any other option": (
        "model: {group_norm_cnn: {width: [4, 8]}}",
        ["group_norm_cnn(width=4) 64 float32 0", "group_norm_cnn(width=8) 64 float32 0"],
    ),
    "entries override the top level": (
        MODEL + "batch_size: 2\nproblems: [{seed: 1}, {model: mlp, batch_size: [4, 8]}]",
        ["logistic 2 float32 1", "mlp 4 float32 0", "mlp 8 float32 0"],
    ),
    "entries multiply with lists at the top level": (
        "batch_size: [2, 4]\nproblems: [{model: mlp}, {model: logistic, batch_size: 8}]",
        ["mlp 2 float32 0", "mlp 4 float32 0", "logistic 8 float32 0"],
    ),
}


@pytest.mark.parametrize(("yaml", "found"), PROBLEMS.values(), ids=PROBLEMS)
def test_problems(load: Any, yaml: str, found: list[str]) -> None:
    assert problems(load(BASE + yaml)) == found


@pytest.mark.parametrize(("yaml", "_found"), PROBLEMS.values(), ids=PROBLEMS)
def test_written_out_it_is_the_same_experiment(load: Any, yaml: str, _found: list[str]) -> None:
    experiment = load(BASE + yaml)
    assert load(experiment.to_yaml()).problems == experiment.problems


BACKENDS = {
    "[naive, {vmap: {chunk_size: [1, 4]}}]": ["naive", "vmap(chunk_size=1)", "vmap(chunk_size=4)"],
    "[{opacus: {mode: [hooks, functorch, ew]}}]": [f"opacus(mode={m})" for m in ("hooks", "functorch", "ew")],
    "[{vmap: {chunk_size: [1, null], randomness: [same, error]}}]": [
        f"vmap(chunk_size={c}, randomness={r})" for c in (1, None) for r in ("same", "error")
    ],
}


@pytest.mark.parametrize("yaml", BACKENDS)
def test_options_of_backends_give_a_row_each(load: Any, yaml: str) -> None:
    experiment = load(BASE + MODEL, [f"backends={yaml}"])
    assert [str(choice) for choice in experiment.resolved_backends()] == BACKENDS[yaml]


def test_options_of_quantities_are_swept(load: Any) -> None:
    quantities = load(BASE + MODEL + "quantities: [{clipped_sum: {max_norm: [0.1, 1]}}, gram]").quantities
    assert [str(q) for q in quantities] == ["clipped_sum(max_norm=0.1)", "clipped_sum(max_norm=1)", "gram"]


def test_option_that_takes_anything_is_never_swept(load: Any) -> None:
    @register_model("takes_anything")
    def takes_anything(example: object, *, what: Any = None) -> None:
        """Never made."""

    assert load(BASE + "model: {takes_anything: {what: [1, 2]}}").problems[0].model.options == {"what": (1, 2)}


TWO = BASE + MODEL + "batch_size: [1, 4]\nquantities: [grads, {clipped_sum: {max_norm: [0.1, 1]}}]\n"
EXCLUDED = {
    "a backend": ("{backend: vmap}", lambda c: c.backend.name == "vmap"),
    "both": ("{backend: vmap, batch_size: 4}", lambda c: c.backend.name == "vmap" and c.problem.batch_size == 4),
    "any of": ("{backend: [naive, vmap], batch_size: [4]}", lambda c: c.problem.batch_size == 4),
    "a bare name": ("{quantity: clipped_sum}", lambda c: c.quantity.name == "clipped_sum"),
    "a label": ("{quantity: clipped_sum(max_norm=1)}", lambda c: c.quantity.options.get("max_norm") == 1),
    "some options": ("{data: {random: {classes: 3}}, batch_size: 1}", lambda c: c.problem.batch_size == 1),
    "options": ("{quantity: {clipped_sum: {max_norm: 1}}}", lambda c: c.quantity.options.get("max_norm") == 1),
    "a name without options": ("{quantity: {clipped_sum: }}", lambda c: c.quantity.name == "clipped_sum"),
    "a truth value": ("{tf32: false, batch_size: 4}", lambda c: c.problem.batch_size == 4),
    "two entries": (
        "{backend: vmap, batch_size: 4}, {quantity: grads}",
        lambda c: c.quantity.name == "grads" or (c.backend.name == "vmap" and c.problem.batch_size == 4),
    ),
}


@pytest.mark.parametrize(("entries", "out"), EXCLUDED.values(), ids=EXCLUDED)
def test_exclude_keeps_out_what_matches_all_of_an_entry(load: Any, entries: str, out: Any) -> None:
    experiment = load(TWO + f"exclude: [{entries}]")
    assert experiment.chosen() == [c for c in experiment.combinations() if not out(c)]
    assert 0 < len(experiment.chosen()) < len(list(experiment.combinations()))


def test_only_drops_entries_that_say_nothing_any_more(load: Any) -> None:
    yaml = TWO + "exclude: [{backend: vmap, batch_size: 4}, {quantity: grads, batch_size: 4}]"
    kept = load(yaml, [], ["naive"])
    assert [dict(entry) for entry in kept.exclude] == [{"quantity": "grads", "batch_size": 4}]
    assert load(kept.to_yaml()).chosen() == kept.chosen()


def test_set_drops_entries_that_say_nothing_any_more(load: Any) -> None:
    yaml = TWO + "exclude: [{backend: vmap, batch_size: 4}, {quantity: grads}]"
    assert cells(load(yaml, ["batch_size=[1, 2]", "quantities=[grads, norms]"])) == [
        f"{n} norms {backend}" for n in (1, 2) for backend in ("naive", "vmap")
    ]


def run(folder: Path, yaml: str, *arguments: str) -> tuple[int, list[Record]]:
    """Run a YAML text; return the exit code and the records."""
    (folder / "e.yaml").write_text(yaml, encoding="utf-8")
    code = command_line.main([str(folder / "e.yaml"), "--out", str(folder / "run"), *arguments])
    return code, read_records(folder / "run" / "results.jsonl")


def ran(records: list[Record]) -> list[tuple[Any, ...]]:
    return [(r.problem["model"], r.problem["batch_size"], r.label, r.status) for r in records]


def test_every_problem_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = FAST + MODEL + "batch_size: [2, 3]\nexclude: [{backend: naive, batch_size: 3}]"
    code, records = run(tmp_path, yaml)
    out = capsys.readouterr().out
    assert code == 0
    assert ran(records) == [
        ("logistic", 2, "naive", "ok"),
        ("logistic", 2, "vmap", "ok"),
        ("logistic", 3, "vmap", "ok"),
    ]
    assert "to run: 3 cells of 2 problems, 1 more excluded\n" in out
    assert "Who wins where" in out
    assert (
        load_experiment(tmp_path / "run" / "experiment.yaml").chosen() == load_experiment(tmp_path / "e.yaml").chosen()
    )


def test_dry_run_says_what_would_run_and_how_much_is_excluded(load: Any, tmp_path: Path, capsys: Any) -> None:
    load(TWO + "exclude: [{backend: vmap, batch_size: 4}, {quantity: clipped_sum}]")
    assert command_line.main([str(tmp_path / "e.yaml"), "--dry-run"]) == 0
    _, _, listed = capsys.readouterr().out.partition("\n\n")
    assert listed.splitlines() == [
        "logistic, random(shape=[5], classes=3), nll · N=1, float32:",
        "would run grads with naive on cpu",
        "would run grads with vmap on cpu",
        "logistic, random(shape=[5], classes=3), nll · N=4, float32:",
        "would run grads with naive on cpu",
        "to run: 3 cells of 2 problems, 9 more excluded",
    ]


UNMADE = FAST + "model: [logistic, simple_cnn, mlp]\nbatch_size: 2"


def test_problem_that_cannot_be_made_costs_the_others_nothing(tmp_path: Path, capsys: Any) -> None:
    code, records = run(tmp_path, UNMADE, "--in-process")
    assert code == 2
    assert capsys.readouterr().err.endswith("takes 1×28×28 inputs with 10 outputs, the data has 5 with 3\n")
    assert [(r.problem["model"], r.status) for r in records] == [
        (model, status)
        for model, status in (("logistic", "ok"), ("simple_cnn", "unsupported"), ("mlp", "ok"))
        for _ in ("naive", "vmap")
    ]
    assert {r.reason for r in records if r.status != "ok"} == {
        "the problem: model 'simple_cnn' takes 1×28×28 inputs with 10 outputs, the data has 5 with 3"
    }


ISOLATIONS = pytest.mark.parametrize("isolation", [None, Isolation()], ids=["in this process", "in children"])


@ISOLATIONS
def test_problem_that_cannot_be_made_gives_records_that_resume_knows(load: Any, isolation: Isolation | None) -> None:
    experiment = load(UNMADE)
    wanted = identities(experiment, torch.device("cpu"), isolation)
    records: list[Record] = []

    def emit(record: Record, _: str) -> None:
        records.append(record)

    with pytest.raises(ProblemError):
        run_experiment(experiment, "e", torch.device("cpu"), emit, None, isolation, finished=wanted[:3])
    assert [r.cell for r in records] == wanted[3:]


@ISOLATIONS
def test_interrupt_leaves_a_record_of_every_cell(load: Any, isolation: Isolation | None) -> None:
    experiment = load(FAST + MODEL + "batch_size: [2, 3, 4]")
    records: list[Record] = []

    def emit(record: Record, _: str) -> None:
        records.append(record)

    class Stop:
        def begin(self, what: str, steps: int, max_s: float | None = None) -> None:
            if what.startswith("problem 2"):
                self.second = True

        def step(self, what: str) -> None:
            if hasattr(self, "second"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, "e", torch.device("cpu"), emit, Stop(), isolation)
    assert [(n, status) for _, n, _, status in ran(records)] == [
        (n, status) for n, status in ((2, "ok"), (3, "interrupted"), (4, "interrupted")) for _ in ("naive", "vmap")
    ]
    assert [r.cell for r in records] == identities(experiment, torch.device("cpu"), isolation)


def test_precision_looks_at_one_problem(load: Any, tmp_path: Path, capsys: Any) -> None:
    load(FAST + MODEL + "batch_size: [2, 3]")
    assert command_line.main(["precision", str(tmp_path / "e.yaml")]) == 2
    assert "has 2 problems, and this command looks at one; leave one with --set" in capsys.readouterr().err
