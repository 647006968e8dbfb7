"""`testbed.compare` on a model of the user's own: what it runs, refuses, and leaves as it was."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import testbed
from backends import available, backend_class, get_backend, load_plugin
from testbed import group, runner
from testbed.processes.host import Failed
from testbed.processes.hosts import InProcess
from testbed.records import Record
from tests.cases import Functional, cross_entropy, mlp
from tests.conftest import kept_registries

HERE = Path(__file__).parent


class Averaged(torch.autograd.Function):
    """Sends the mean of losses back, as if the loss were it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g / len(g)


def compare(model: nn.Module | None = None, loss_fn: Any = cross_entropy, **options: Any) -> testbed.Report:
    torch.manual_seed(0)
    inputs, targets = torch.randn(6, 5), torch.randint(2, (6,))
    return testbed.compare(model or mlp(), loss_fn, inputs, targets, rounds=2, max_s=1, **options)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def flat(report: testbed.Report) -> str:
    return " ".join(str(report).split())


def computes(record: Record) -> bool:
    """Return whether a record's backend computes its quantity at all."""
    return record.quantity.partition("(")[0] in backend_class(record.backend).quantities


def test_runs_all_backends_and_quantities() -> None:
    report = compare(quantities=["grads", "norms", {"clipped_sum": {"max_norm": 0.5}}])
    assert {r.status for r in report.records if computes(r)} == {"ok"}
    assert {r.status for r in report.records if not computes(r)} <= {"unsupported"}
    assert len(report.records) == 3 * len(available())
    assert {r.quantity for r in report.records} == {"grads", "norms", "clipped_sum(max_norm=0.5)"}


def test_report_is_a_table_and_html() -> None:
    report = compare(backends=["naive", {"opacus": {"mode": "ew"}}])
    assert "opacus(mode=ew)" in str(report)
    assert "ordinary step" in str(report)
    assert "limit" in str(report)
    assert max(map(len, str(report).splitlines())) <= 80
    assert "<td>opacus(mode=ew)</td>" in report._repr_html_()


def test_timing_has_what_the_table_shows() -> None:
    (naive, vmap) = compare(backends=["naive", "vmap"]).records
    assert naive.timing["verdict"] == "baseline"
    assert vmap.timing["verdict"] in ("faster", "slower", "can't tell")
    low, high = vmap.timing["ratio_ci"]
    assert low <= vmap.timing["ratio"] <= high
    assert len(vmap.timing["samples_s"]) == vmap.timing["rounds"]
    assert vmap.timing["ordinary"]["median_s"] > 0
    assert vmap.timing["limit"]["seconds"] > 0
    assert set(vmap.phases) >= {"import_s", "prepare_s", "first_call_s"}


def test_the_baseline_is_timed_again_by_a_host_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Hosts(InProcess):
        def __getitem__(self, label: str) -> Any:
            asked.append(label)
            return super().__getitem__(label)

    monkeypatch.setattr(runner, "_hosts", lambda setup, *_: Hosts(setup))
    (record,) = compare(backends="naive").records
    assert record.timing["floor"] >= 0
    assert asked.count(group.AGAIN) == 1 + 1 + record.timing["rounds"]  # preparing, warming up, rounds


def test_a_second_baseline_that_dies_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:
        def again(self, cell: object, name: str) -> None:
            pass

        def time(self, name: str) -> Any:
            raise Failed("crash", "killed by SIGKILL", "")

    class Hosts(InProcess):
        def __getitem__(self, label: str) -> Any:
            return Dying() if label == group.AGAIN else super().__getitem__(label)

    monkeypatch.setattr(runner, "_hosts", lambda setup, *_: Hosts(setup))
    report = compare(backends="naive")
    said = "the second naive, which shows the noise, could be timed no more: crash: killed by SIGKILL"
    assert said in report.records[0].environment["disturbances"]
    assert said in " ".join(str(report).split())


def test_memory_that_is_kept_for_results_counts() -> None:
    (record,) = compare(nn.Linear(5, 300_000), backends="bookkeeping").records
    if record.memory["peak_bytes"] is None:
        pytest.skip("this machine does not tell")
    assert record.memory["peak_bytes"] > 5.8 * 6 * 300_000 * 4  # the result of five inputs, and the outputs


def test_what_was_chosen_by_measuring_is_in_the_record() -> None:
    model = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3, dilation=2), nn.Flatten())
    naive, bookkeeping = compare(model, backends=["naive", "bookkeeping"]).records
    assert "choices" not in naive.phases
    assert bookkeeping.phases["choices"]["passes of Sequential"] == "over the batch"
    assert "weight 2×1×3, input 1×1×5, dilation 2, float32, cpu, 4 samples or more" in bookkeeping.phases["choices"]


def careless(outputs: object, targets: object) -> Any:
    raise IndexError("no such class")


def test_a_loss_that_fails_is_not_blamed_on_the_model() -> None:
    reason = (
        "model, loss and batch do not fit together: the loss `careless`: IndexError: no such class (test_compare.py:"
    )
    records = compare(nn.Linear(5, 2), careless).records
    assert all(r.reason.startswith(f"the problem: {reason}") for r in records)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), "`1` (BatchNorm1d) in training mode"),
        (Functional(lambda s, x: F.dropout(s.a(x)), a=nn.Linear(5, 2)), "`model` (Functional) is random"),
        (nn.Sequential(nn.Linear(5, 2), nn.RReLU()), "`1` (RReLU) is random"),
        (nn.Sequential(nn.Linear(5, 2), nn.Softmax(dim=0)), "`1` (Softmax) mixes the samples of a batch"),
        (
            Functional(lambda s, x: Averaged.apply(s.a(x)), a=nn.Linear(5, 2)),
            "a backward pass depends on the batch",
        ),
    ],
    ids=["BatchNorm", "functional dropout", "RReLU", "softmax over the batch", "backward pass"],
)
def test_problem_without_gradients_is_refused_for_every_backend(model: nn.Module, reason: str) -> None:
    records = compare(model).records
    assert {r.status for r in records} == {"unsupported"}
    assert all(r.reason.startswith("the problem: ") and reason in r.reason for r in records)


def undefined(s: nn.Module, x: torch.Tensor) -> Any:
    return s.a(x) + nowhere  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Linear(4, 2), "`model` (Linear(in_features=4, out_features=2, bias=True)): RuntimeError: "),
        (Functional(undefined, a=nn.Linear(5, 2)), "NameError: name 'nowhere' is not defined (test_compare.py:"),
    ],
    ids=["wrong shape", "undefined name"],
)
def test_a_model_that_fails_is_an_error_that_says_where(model: nn.Module, reason: str) -> None:
    records = compare(model).records
    assert {r.status for r in records} == {"error"}
    fit = "the problem: model, loss and batch do not fit together: "
    assert all(r.reason.startswith(fit) and reason in r.reason for r in records)


def test_a_problem_that_does_not_fit_into_memory_is_not_one_without_gradients() -> None:
    def greedy(s: nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 192.00 MiB")

    records = compare(Functional(greedy, a=nn.Linear(5, 2))).records
    assert {r.status for r in records} == {"oom"}
    assert all(r.reason.startswith("the problem: CUDA out of memory. Tried") for r in records)


def test_loss_that_is_reduced_says_how_to_mend_it() -> None:
    report = testbed.compare(mlp(), nn.CrossEntropyLoss(), torch.ones(4, 5), torch.zeros(4, dtype=torch.long))
    assert all("use reduction='none'" in r.reason for r in report.records)


@pytest.mark.parametrize(("made", "what"), [(None, "nothing"), (1.0, "a float"), ((), "a tuple")])
def test_loss_that_returns_no_tensor_is_told(made: Any, what: str) -> None:
    report = testbed.compare(mlp(), lambda outputs, targets: made, torch.ones(4, 5), torch.zeros(4), "naive")
    (record,) = report.records
    assert record.status == "error"
    assert record.reason == f"the problem: the loss `<lambda>` returned {what}, not a tensor [4]: one loss a sample"


def test_loss_that_uses_the_model_itself_is_refused() -> None:
    model = mlp()

    def penalised(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(outputs, targets) + model[-1].bias.square().sum()

    torch.manual_seed(0)
    records = testbed.compare(model, penalised, torch.randn(6, 5), torch.randint(2, (6,))).records
    last = len(model) - 1
    assert all(f"`{last}.bias` of the model itself is used" in r.reason for r in records)


def test_loss_that_couples_samples_is_refused() -> None:
    def coupled(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = cross_entropy(outputs, targets)
        return losses / losses.detach().sum()

    torch.manual_seed(0)
    records = testbed.compare(mlp(), coupled, torch.randn(6, 5), torch.randint(2, (6,))).records
    assert all("the loss, or a function outside any module, mixes" in r.reason for r in records)


def test_loss_with_class_weights_is_asked_in_float64_too() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0]), reduction="none")
    report = testbed.compare(mlp(), loss, torch.randn(6, 5), torch.randint(2, (6,)), rounds=2)
    assert {r.status for r in report.records if computes(r)} == {"ok"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model": lambda x: x}, "model should be a torch.nn.Module"),
        ({"model": nn.ReLU()}, "the model has no floating-point parameter"),
        ({"model": nn.LazyLinear(2)}, "parameters without values (meta device or lazy module)"),
        ({"model": nn.Linear(5, 2, device="meta")}, "parameters without values (meta device"),
        ({"loss_fn": None}, "loss_fn should be a function"),
        ({"inputs": torch.zeros(0, 5), "targets": torch.zeros(0)}, "a batch holds at least one sample, found none"),
        ({"targets": torch.zeros(5)}, "found 6 and 5"),
        (
            {"inputs": {"x": [1.0]}},
            "inputs['x'] should be a tensor [N, ...], found list; what belongs to no sample goes",
        ),
        ({"inputs": (torch.zeros(6, 5), None)}, "inputs[1] should be a tensor [N, ...], found NoneType"),
        ({"inputs": 3}, "a batch is a tensor"),
        ({"targets": (torch.zeros(6),)}, "targets should be one tensor [N, ...], found tuple"),
        ({"fresh": ((torch.zeros(6, 5), 1), torch.zeros(6))}, "fresh[0][1] should be a tensor [N, ...], found int"),
        ({"fresh": (torch.zeros(6, 5), [0] * 6)}, "fresh[1] should be one tensor [N, ...], found list"),
        ({"backends": "vmpa"}, "unknown backend 'vmpa' (did you mean 'vmap'?)"),
        ({"quantities": "norm"}, "unknown quantity 'norm' (did you mean 'norms'?)"),
        ({"baseline": "nope"}, "unknown baseline 'nope'"),
        ({"backends": []}, "backends should name at least one, found none"),
        ({"quantities": []}, "quantities should name at least one, found none"),
        ({"backends": [get_backend("vmap")]}, "should be a name, or {name: {option: value}}, found "),
        ({"fresh": torch.zeros(6, 5)}, "fresh should be a pair (inputs, targets), found Tensor"),
        ({"fresh": (torch.zeros(3, 5), torch.zeros(6))}, "fresh should hold as many targets as inputs, found 3 and 6"),
        ({"rounds": 0}, "'rounds': should be greater than or equal to 2, found 0"),
        ({"max_s": "long"}, "'max_s': should be a number, found 'long'"),
    ],
)
def test_a_wrong_argument_is_said(arguments: dict[str, Any], sentence: str) -> None:
    right = {"model": mlp(), "loss_fn": cross_entropy, "inputs": torch.zeros(6, 5), "targets": torch.zeros(6)}
    with pytest.raises((TypeError, ValueError, LookupError), match=re.escape(sentence)):
        testbed.compare(**{**right, **arguments})  # type: ignore[arg-type]


def test_data_that_gives_no_finite_loss_is_refused_once() -> None:
    report = testbed.compare(mlp(), cross_entropy, torch.full((6, 5), torch.nan), torch.zeros(6, dtype=torch.long))
    assert {r.reason for r in report.records} == {
        "the problem: the loss of sample 0 is nan: there is nothing to compare"
    }


@pytest.mark.parametrize("error", [OSError("no source"), TypeError("a built-in class")])
def test_a_backend_typed_into_an_interpreter_has_no_source(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    naive, found = backend_class("naive"), inspect.getsourcefile

    def fails(thing: Any) -> str | None:
        if thing is naive:
            raise error
        return found(thing)  # PyTorch's compiler, where it is imported only now, asks too

    monkeypatch.setattr("testbed.cell.inspect.getsourcefile", fails)
    (record,) = compare(backends="naive", quantities="norms").records
    assert (record.status, record.environment["backend_source"]) == ("ok", "unknown")


def test_it_does_not_matter_what_the_default_device_is() -> None:
    model, inputs, targets = mlp(), torch.randn(20, 5), torch.randint(2, (20,))
    backends = ["naive", "vmap", "bookkeeping", "opacus", "backpack"]  # nngeometry minds
    with torch.device("meta"):
        records = testbed.compare(model, cross_entropy, inputs, targets, backends, rounds=2, max_s=1).records
    assert {r.status for r in records} == {"ok"}, [r.reason for r in records]


def test_a_string_is_one_name() -> None:
    assert [r.backend for r in compare(backends="vmap", quantities="norms").records] == ["vmap"]


def test_model_is_left_as_it_was() -> None:
    from testbed.integrity import Snapshot

    model = mlp()
    torch.manual_seed(0)
    x, y = torch.randn(6, 5), torch.randint(2, (6,))
    snapshot = Snapshot(model)
    testbed.compare(model, cross_entropy, x, y, rounds=2)
    assert snapshot.change() is None


def test_sample_whose_gradient_is_not_finite_is_reported() -> None:
    root = Functional(lambda s, x: s.a(x).abs().sqrt(), a=nn.Linear(5, 2, bias=False))  # no slope at zero
    inputs = torch.randn(6, 5)
    inputs[2] = 0
    backends = ["naive", "vmap", "opacus_ghost", "planted_finite"]
    with kept_registries():
        load_plugin(HERE / "planted.py")
        report = testbed.compare(
            root, lambda o, t: o.sum(1), inputs, inputs, backends, ["norms", "clipped_sum"], rounds=2
        )
    assert [r.status for r in report.records if r.backend != "planted_finite"] == ["ok"] * 6
    hiding = [r.reason for r in report.records if r.backend == "planted_finite"]
    assert hiding[0] == "finite numbers in `norms`, 1 of 6 samples (2), where the truth is not finite"
    assert hiding[1] == "finite numbers in `a.weight`, where the truth is not finite"
    assert "The truth is not finite in `norms`, 1 of 6 samples (2)" in flat(report)


def test_autocast_is_held_to_what_its_arithmetic_allows() -> None:
    report = compare(backends=["naive", {"vmap": {"autocast": "bfloat16"}}, {"backpack": {"autocast": "bfloat16"}}])
    assert [r.status for r in report.records] == ["ok"] * 3
    exact, *coarse = (r.agreement["precision"]["error"] for r in report.records)
    assert exact < 1e-5 < 1e-4 < min(coarse)


def test_compiling_has_a_phase_and_recompiling_is_counted() -> None:
    with kept_registries():
        load_plugin(HERE / "planted.py")
        report = compare(backends=["naive", "planted_recompiled", {"vmap": {"compile": True}}])
    _, again, once = sorted(report.records, key=lambda r: r.backend)
    assert once.phases["compile_s"] > 0
    assert (once.phases["compiled"], once.phases["recompiles"]) == (1, 0)
    assert again.phases["recompiles"] > 0
    assert re.search(r"planted_recompiled: compiling took .*; it was compiled \d+ more times while", flat(report))


def test_allclose_is_the_tutorials_rule() -> None:
    report = compare(backends=["naive", "vmap"], agreement={"allclose": {"atol": 3e-3, "rtol": 1e-5}})
    assert {r.agreement["precision"]["question"] for r in report.records} == {"allclose"}
    assert all("same_function" not in r.agreement for r in report.records)
