"""Runs as a whole: what is wrong is caught and explained, what is right is timed, what ends early has its record."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from backends import get_backend
from testbed.__main__ import main
from testbed.agreement import Calibrated
from testbed.problems import make_problem
from testbed.records import read_records
from testbed.worker import Worker
from tests.conftest import kept_registries

HERE = Path(__file__).parent
WRONG = {
    "zeros": "every gradient is zero",
    "averaged": "every gradient is 1/6 of the truth",
    "permuted": "the samples are permuted: row i is sample i + 5, round the end",
    "one_row_repeated": "every sample has the same gradient, that of sample 0",
    "one_parameter_scaled": "only `1.weight` of 2 parameters: every gradient is 1.001 times the truth",
    "nan": "nonfinite numbers in `1.weight`, `1.bias`, every sample",
    "missing": "1 of 2 parameters are missing: `1.weight`",
    "extra": "there are extra parameters: `other`",
    "transposed": "(transposed)",
    "summed": "the samples' axis is missing",
    "not_a_mapping": "the result is a list",
    "drifting": "after timing, on fresh data: every gradient is 1.01 times the truth",
    "caching": "after timing, on fresh data",
    "memo": "after timing, on fresh data",
    "alias": "it reuses a buffer",
    "lazy": "the result is a Lazy, not a dict",
    "late_weights": "the backend changed what is the caller's: the values of `1.weight`",
    "inputs": "the backend changed what is the caller's: the values of `input 0`",
    "hook": "the backend changed what is the caller's: hooks",
    "negates_the_last": "it reuses a buffer",
    "two_buffers": "it reuses a buffer",
    "four_buffers": "it reuses a buffer",
    "buffers_by_pointer": "it reuses a buffer",
    "last_if_twice": "a timed call returned something else than the same call after timing",
    "replaced": "the backend changed what is the caller's: which parameter is `weight`",
    "more_modules": "the backend changed what is the caller's: names of parameters and buffers: more 1.bias",
    "no_bias": "the backend changed what is the caller's: names of parameters and buffers: 1.bias",
    "late": "`1.weight` is a Late, not a tensor [6, 3, 5]",
    "uncollected": "the backend changed what is the caller's: the garbage collector",
    "elsewhere": "the backend changed what is the caller's: the working directory",
    "stale_bias": "in-place updates of the model's parameters are not seen by later calls: ",
    "weight_hook": "the backend changed what is the caller's: hooks of the parameters",
    "attribute": "the backend changed what is the caller's: the attribute `grad_sample`",
    "seed": "the backend changed what is the caller's: the random state of Python or NumPy",
    "deterministic": "the backend changed what is the caller's: PyTorch's deterministic mode",
    "coarse": "the backend changed what is the caller's: PyTorch's precision of float32",
    "gradients_off": "the backend changed what is the caller's: PyTorch's gradient mode",
    "threads": "the backend changed what is the caller's: PyTorch's number of threads",
    "stale": "in-place updates of the model's parameters are not seen",
    "mutating": "the backend changed what is the caller's: the values of `1.weight`",
}
YAML = """
model: logistic
data: {random: {shape: [5], classes: 3}}
loss: nll
batch_size: 6
device: cpu
timing: {rounds: 2, max_s: 1}
backends: [naive, %s]
"""


def run(folder: Path, names: str) -> Any:
    """Run an experiment with planted backends; return exit code and records by name."""
    (folder / "e.yaml").write_text(YAML % names)
    with kept_registries():
        code = main(
            [str(folder / "e.yaml"), "--plugin", str(HERE / "planted.py"), "--out", str(folder / "run"), "--in-process"]
        )
    return code, {r.backend.removeprefix("planted_"): r for r in read_records(folder / "run" / "results.jsonl")}


@pytest.fixture(scope="module")
def all_wrong(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("planted"), ", ".join([*(f"planted_{name}" for name in WRONG), "vmap"]))


@pytest.mark.parametrize("name", WRONG)
def test_planted_error_is_caught_and_named(all_wrong: Any, name: str) -> None:
    _, records = all_wrong
    record = records[name]
    assert record.status == ("nonfinite" if name == "nan" else "disagrees")
    assert WRONG[name] in record.diagnosis
    assert "\n" not in record.reason
    assert record.timing.get("ratio") is None, "a wrong result gets no speed-up"


def test_a_batch_larger_than_question_1_takes_is_explained_by_its_own_size(tmp_path: Path) -> None:
    """Question 1 looks at 16 samples; a backend that divides by N = 64 is 1/64 of the truth all the same."""
    (tmp_path / "e.yaml").write_text(YAML.replace("batch_size: 6", "batch_size: 64") % "planted_averaged")
    with kept_registries():
        main(
            [
                str(tmp_path / "e.yaml"),
                "--plugin",
                str(HERE / "planted.py"),
                "--out",
                str(tmp_path / "run"),
                "--in-process",
            ]
        )
    wrong = next(r for r in read_records(tmp_path / "run" / "results.jsonl") if r.status == "disagrees")
    assert wrong.diagnosis.startswith("every gradient is 1/64 of the truth")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("name", "max_norm", "words"),
    [("always_scaled", 1e-3, "small ones too"), ("never_clipped", 1e3, "the result is the unclipped sum")],
)
def test_a_norm_that_clips_all_or_nothing_hides_no_error(
    name: str, max_norm: float, words: str, tmp_path: Path
) -> None:
    quantities = f"\nquantities: [{{clipped_sum: {{max_norm: {max_norm}}}}}]"
    code, records = run(tmp_path, f"planted_{name}, vmap]{quantities}\n#")
    assert (records["vmap"].status, code) == ("ok", 1)
    assert records[name].diagnosis.startswith("where max_norm=")
    assert words in records[name].diagnosis


def test_a_baseline_that_turns_out_wrong_gives_no_speed_ups(tmp_path: Path) -> None:
    code, records = run(tmp_path, "vmap, planted_drifting]\nbaseline: planted_drifting\n#")
    assert (records["drifting"].status, records["vmap"].status, code) == ("disagrees", "ok", 1)
    assert records["vmap"].timing["ratio"] is None
    assert records["vmap"].timing["ordinary"]["ratio"] > 0


def test_every_timed_call_sees_other_samples() -> None:
    """A backend that keeps what it has computed of a batch would else be timed at looking it up."""
    problem = make_problem("mlp", "random", "cross_entropy", batch_size=6)
    worker, seen = Worker(problem, "grads", {}, Calibrated()), []
    right = get_backend("naive").grads(problem.model, problem.loss_fn)
    worker.functions["mine"] = lambda *batch: seen.append(tuple(t.clone() for t in batch)) or right(*batch)
    for _ in range(4):
        worker.time("mine")
    drawn = [inputs for inputs, _ in seen[1::2]]  # a short call has one before it
    assert not any(torch.equal(a, b) for a, b in pairwise(drawn))
    known = {(tuple(x.flatten().tolist()), int(t)) for x, t in zip(problem.inputs, problem.targets, strict=True)}
    assert all((tuple(x.flatten().tolist()), int(t)) in known for call in seen for x, t in zip(*call, strict=True))


def test_a_backend_that_exits_is_an_error_of_its_own(tmp_path: Path) -> None:
    code, records = run(tmp_path, "vmap, planted_exit")
    assert (records["exit"].status, records["vmap"].status, code) == ("error", "ok", 3)


def test_a_right_backend_beside_wrong_ones_stays_right(all_wrong: Any) -> None:
    code, records = all_wrong
    assert records["naive"].status == "ok"
    assert records["vmap"].status == "ok", records["vmap"].reason
    assert code == 1


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", WRONG)
def test_each_planted_error_alone_ends_with_exit_1(name: str, tmp_path: Path) -> None:
    code, _ = run(tmp_path, f"planted_{name}")
    assert code == 1
