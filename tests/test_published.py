"""The published workloads: every file loads in every size, and the small size is a problem that repeats."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from backends.batch import call
from testbed.config.docs import README
from testbed.config.experiment import Published
from testbed.config.load import load_experiment
from testbed.jobs import problem_of
from testbed.problems import Problem, ProblemError
from testbed.records import Record
from testbed.report import Report
from testbed.report.page import write_page
from tests.test_report import record

FOLDER = README.parent / "published"
FILES = sorted(FOLDER.glob("*.yaml"))
CPU = torch.device("cpu")

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def small(file: Path) -> Problem:
    """Make a file's problem of size `small` with two samples; skip where an optional library is not installed."""
    (workload,) = load_experiment(file, ["size=small", "batch_size=2"]).problems
    try:
        return problem_of(workload, CPU)
    except ProblemError as error:
        if "pip install" in str(error):
            pytest.skip(str(error))
        raise


once = cache(small)  # for the tests that do not change it


def losses(p: Problem) -> torch.Tensor:
    return p.loss_fn(call(p.model, p.inputs), p.targets)


def test_the_readme_lists_every_file() -> None:
    listed = re.findall(r"\]\(published/(\w+)\.yaml\)", README.read_text(encoding="utf-8"))
    assert sorted(listed) == [file.stem for file in FILES]


@each_file
def test_every_file_has_the_published_size_by_default_and_a_small_one(file: Path) -> None:
    assert load_experiment(file).size == "published"
    (published,), (small,) = (load_experiment(file, [f"size={s}"]).problems for s in ("published", "small"))
    assert small.batch_size < published.batch_size
    assert small.model.name == published.model.name


@each_file
def test_every_file_names_its_publication_and_says_what_each_figure_is(file: Path) -> None:
    published = load_experiment(file).published
    assert published
    assert all(p.what and p.quantity for p in published if p.figure)


@each_file
def test_every_small_problem_has_one_finite_loss_a_sample(file: Path) -> None:
    found = losses(once(file))
    assert found.shape == (2,)
    assert found.isfinite().all()


@each_file
def test_every_small_problem_is_the_same_each_time(file: Path) -> None:
    a, b = once(file), small(file)
    assert torch.equal(losses(a), losses(a))
    assert torch.equal(losses(a), losses(b))


@each_file
def test_no_published_model_is_random_or_couples_samples(file: Path) -> None:
    coupling = nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm
    assert [m for m in once(file).model.modules() if isinstance(m, coupling) and getattr(m, "p", 1) > 0] == []


def test_frozen_blocks_of_bert_and_its_embeddings_are_not_trained() -> None:
    pytest.importorskip("transformers")
    options = ["size=small", "batch_size=1", "model.bert.frozen=1"]  # the published one has 7 680 771 parameters left
    (workload,) = load_experiment(FOLDER / "bert_base.yaml", options).problems
    trained = {name for name, p in problem_of(workload, CPU).model.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"encoder", "pooler", "weight", "bias"}
    assert not any(".layer.0." in name for name in trained)


PAPER: dict[str, Any] = {"source": "Paper", "hardware": "GPU", "what": "It is fast.", "figure": 3.0}
STEP = {"quantity": "grads", "backend": "vmap"}


def shown(published: dict[str, Any], *records: Record, size: str | None = None) -> str:
    """Return the lines of a report about what is published, as one."""
    text = str(Report(records, [Published(**PAPER | published)], size))
    return " ".join(text[text.index("Published / here") :].split())


def test_ours_stands_beside_the_published_figure_by_backend_and_quantity() -> None:
    found = shown(STEP, record("naive", 8), record("vmap", 2))
    assert "Paper (GPU): It is fast. vmap grads: published 3.00 × step / here 2.00 " in found


def test_a_figure_relative_to_the_baseline_is_set_beside_that_ratio() -> None:
    r = record("vmap", 2)
    r.timing.update(baseline="naive", ratio=0.25, ratio_ci=[0.2, 0.3])
    assert "published 3.00 × naive / here 0.25 [0.20–0.30] (N=" in shown(STEP | {"relative_to": "baseline"}, r)


def test_a_figure_of_no_backend_here_is_set_beside_the_cheapest_right_one() -> None:
    found = shown({"quantity": "grads"}, record("naive", 8), record("vmap", 2), record("opacus", None))
    assert "grads: published 3.00 × step / here 2.00 " in found
    assert "(vmap, N=" in found


@pytest.mark.parametrize(("backend", "by"), [({"backend": "vmap"}, ""), ({}, "vmap, ")])
def test_a_figure_of_no_quantity_is_set_beside_every_one(backend: dict[str, str], by: str) -> None:
    found = shown(backend, record("naive", 8), record("vmap", 2), record("vmap", 4, "norms"))
    assert re.search(rf"step / here 2\.00 .*\({by}grads, N=.*, 4\.00 .*\({by}norms, N=", found)


@pytest.mark.parametrize("other", [{"quantity": "norms"}, {"backend": "opacus"}])
def test_what_was_not_measured_here_is_said(other: dict[str, str]) -> None:
    assert "published 3.00 × step / not measured here." in shown(STEP | other, record("vmap", 2))


def test_a_publication_without_a_figure_is_named_and_the_size_too() -> None:
    nothing = shown({"what": "", "figure": None}, record("vmap", 2), size="small")
    assert nothing == "Published / here, at size 'small' • Paper (GPU): states no figure for this."


def test_the_page_of_a_run_shows_what_its_experiment_says_is_published(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text("size: small\npublished: [{source: Paper, what: It is fast.}]\n")
    text = write_page([record("vmap", 2)], tmp_path).read_text(encoding="utf-8")
    assert "Published / here, at size &#39;small&#39;" in text
    assert "<li>Paper: It is fast.</li>" in text


@pytest.mark.parametrize("experiment", [None, "published: 3", "[]", "published: [{sorce: A}]", "a: ["])
def test_a_page_without_publications_is_a_page(experiment: str | None, tmp_path: Path) -> None:
    if experiment:
        (tmp_path / "experiment.yaml").write_text(experiment)
    assert "Published" not in write_page([record("vmap", 2)], tmp_path).read_text(encoding="utf-8")
