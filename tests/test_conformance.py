"""The conformance matrix: no wrong cell, no refusal without need, every rule proven by a case that is wrong without it.

The default run takes a representative part of the matrix; `pytest -m matrix` takes all of it.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from backends import backend_class, get_backend, reference
from backends.base import QUANTITIES, Unavailable, Unsupported, guarded, unguarded
from testbed.conformance import capabilities
from testbed.conformance.case import Case
from testbed.conformance.report import KINDS, row_of, unguarded_status
from testbed.conformance.sweep import RULE, all_cases, choose_cases, choose_cells, row, sweep
from testbed.problems import Problem
from testbed.problems.base import put
from testbed.records import Record
from testbed.referee import Referee
from tests.asserts import assert_close
from tests.cases import DEVICE

README = Path(__file__).parent.parent / "backends" / "README.md"
WHOLE_ROWS = ("Linear", "PReLU", "Embedding", "InstanceNorm1d", "GRU")  # of the table, run in every test run
THIN = ("Linear", "Conv2d", "Embedding", "raw: a scalar", "tied: one weight in two modules", "unused: by some samples")

# Refused though the library would be right, each with the reason why it cannot be told.
NEEDLESS = {
    r"opacus(_ghost.*)?, \S+, EmbeddingBag offsets, no token twice": "the data would have to be looked at",
    r"backpack, variance, .* (reordered|sorted|shuffled)": "order does not matter to a variance, but mixing does",
}


def representative() -> list[Case]:
    """Return every layer's base case, every whole-model case, and some whole rows."""
    return [c for c in all_cases() if not c.option or c.layer == "model" or c.layer in WHOLE_ROWS]


def run(cases: Sequence[Case], quantities: Sequence[str] = ("grads",), **options: Any) -> list[Record]:
    records: list[Record] = []
    sweep(cases, choose_cells((), quantities), lambda record, _: records.append(record), **options)
    return records


def test_cells_run_where_they_are_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is a GPU where there is one."""
    asked = []
    monkeypatch.setattr("testbed.conformance.sweep.put", lambda p, device: asked.append(device) or put(p, device))
    records = run(choose_cases("Linear"), device=DEVICE)
    assert set(asked) == {DEVICE}
    assert {r.problem["device"] for r in records} == {DEVICE.type}
    assert {r.status for r in records if r.backend == reference()} == {"ok"}


@pytest.fixture(scope="module", params=["representative", pytest.param("all", marks=pytest.mark.matrix)])
def grads(request: pytest.FixtureRequest) -> list[Record]:
    return run(all_cases() if request.param == "all" else representative())


@pytest.fixture(
    scope="module",
    params=[(THIN, "representative"), pytest.param((None, "all"), marks=pytest.mark.matrix)],
    ids=lambda p: p[1],
)
def others(request: pytest.FixtureRequest) -> list[Record]:
    wanted = request.param[0]
    return run([c for c in all_cases() if wanted is None or c.name in wanted], [q for q in QUANTITIES if q != "grads"])


def described(records: Sequence[Record]) -> list[str]:
    return [f"{r.label}, {r.quantity}, {r.problem['case']}: {r.reason}" for r in records]


def of_kind(records: Sequence[Record], *kinds: str) -> list[str]:
    return described([r for r in records if KINDS[r.status] in kinds])


def test_no_cell_is_wrong_or_an_error(grads: list[Record]) -> None:
    assert of_kind(grads, "wrong", "error") == []


def test_bookkeeping_runs_whatever_the_loop_runs(grads: list[Record], others: list[Record]) -> None:
    """As the README has it."""
    loops = {r.problem["case"] for r in grads if r.backend == reference() and r.status == "ok"}
    assert loops
    mine = [r for r in [*grads, *others] if r.backend == "bookkeeping" and r.problem["case"] in loops]
    assert mine
    assert described([r for r in mine if r.status != "ok"]) == []


def test_no_cell_of_the_other_quantities_is_wrong_or_an_error(others: list[Record]) -> None:
    assert of_kind(others, "wrong", "error") == []


def test_derived_quantities_are_right_where_grads_is(grads: list[Record], others: list[Record]) -> None:
    right = {(r.label, r.problem["case"]) for r in grads if r.status == "ok"}
    both = {r.problem["case"] for r in grads} & {r.problem["case"] for r in others}
    derived = [r for r in others if r.problem["case"] in both and not r.timing["native"]]
    assert derived
    for r in derived:
        assert (r.status == "ok") == ((r.label, r.problem["case"]) in right), described([r])


def test_what_is_refused_without_need_is_known(grads: list[Record], others: list[Record]) -> None:
    needless = described([r for r in [*grads, *others] if unguarded_status(r) == "ok"])
    assert [line for line in needless if not any(re.match(known, line) for known in NEEDLESS)] == []


def test_every_refusal_is_one_line_that_names_a_place(grads: list[Record]) -> None:
    refused = [r for r in grads if r.status == "unsupported" and not r.reason.startswith("the problem: ")]
    assert described([r for r in refused if "`" not in r.reason or "\n" in r.reason]) == []


def test_the_reference_refuses_problems_only(grads: list[Record]) -> None:
    mine = [r for r in grads if r.backend == reference() and r.status != "ok"]
    assert described([r for r in mine if not r.reason.startswith("the problem: ")]) == []


def test_the_capability_table_is_not_stale(grads: list[Record]) -> None:
    table = capabilities.read(README)
    made_with = capabilities.libraries(grads)
    if any(f"{name} {version}" not in table for name, version in made_with.items()):
        pytest.skip(f"the table was made with other versions than {made_with}")
    everything = all_cases()
    whole = {row_of(r) for r in grads}
    sizes = {name: sum(row(c.layer, c.name) == name for c in everything) for name in whole}
    found = {name: len({r.problem["case"] for r in grads if row_of(r) == name}) for name in whole}
    mine = [r for r in grads if found[row_of(r)] == sizes[row_of(r)]]
    now, then = capabilities.rows(capabilities.capabilities(mine)), capabilities.rows(table)
    for name in {row_of(r) for r in mine} | {""}:
        assert then.get(name) == now[name], "python -m testbed conformance --write-table backends/README.md"


# (the rule, the backend with options and quantity, the case that proves it, words of the refusal). A rule that several
# libraries need stands in backends/module_calls.py, else in the backend's file; its docstring names the case.
Variant = tuple[str, dict[str, Any], str]
HOOKS: Variant = ("opacus", {}, "grads")
FUNCTORCH: Variant = ("opacus", {"mode": "functorch"}, "grads")
EW: Variant = ("opacus", {"mode": "ew"}, "grads")
GHOST: Variant = ("opacus_ghost", {}, "norms")
BACKPACK: Variant = ("backpack", {}, "grads")
BACKPACK_NORMS: Variant = ("backpack", {}, "norms")
EXPANDED: Variant = ("expanded_weights", {}, "grads")
TORCHJD: Variant = ("torchjd", {}, "gram")
NNGEOMETRY: Variant = ("nngeometry", {}, "grads")
NNGEOMETRY_GRAM: Variant = ("nngeometry", {}, "gram")
WATCHING = (HOOKS, FUNCTORCH, EW, BACKPACK, EXPANDED, TORCHJD)
RULES = [
    *(
        ("_outside", b, "functional: F.linear after the module", "outside the call")
        for b in (HOOKS, FUNCTORCH, BACKPACK, TORCHJD, NNGEOMETRY)
    ),
    *(
        ("_outside", b, "functional: a penalty on the weight", "outside the call")
        for b in (HOOKS, FUNCTORCH, BACKPACK, TORCHJD, NNGEOMETRY)
    ),
    *(
        ("_differentiated", b, "mode: a double backward", "the forward pass takes a gradient")
        for b in (EW, EXPANDED, TORCHJD)
    ),
    *(
        ("_differentiated", b, "mode: a gradient in the forward", "takes a gradient")
        for b in (HOOKS, FUNCTORCH, EW, EXPANDED)
    ),
    *(
        ("_replaced", b, "functional: functional_call with other weights", "other weights")
        for b in (HOOKS, FUNCTORCH, TORCHJD, NNGEOMETRY)
    ),
    *(
        ("_altered", b, "module: a hook triples the output", "changes its output")
        for b in (HOOKS, BACKPACK, NNGEOMETRY)
    ),
    *(("_altered", b, "module: a hook triples the input", "changes its input") for b in (FUNCTORCH, TORCHJD)),
    *(("_unseen", b, "module: an optional second tensor", "takes 2 tensor(s)") for b in (HOOKS, FUNCTORCH)),
    *(("_unseen", b, "module: an optional tensor by keyword", "as keyword") for b in (HOOKS, FUNCTORCH)),
    *(("_miscounted", b, "Linear sequence-first, T = N", "batch axes of [4, 4]") for b in WATCHING),
    *(
        ("_miscounted", b, "Linear called with batches of N and of 1", "batch axes of [1, 1]")
        for b in (HOOKS, FUNCTORCH, TORCHJD)
    ),
    *(("_strayed", b, "Linear samples reordered in the model", "takes row i to be sample i") for b in WATCHING),
    *(
        ("_strayed", b, f"batch: samples {moved} in the model", "takes row i to be sample i")
        for b in (*WATCHING, NNGEOMETRY)
        for moved in ("sorted", "shuffled at random")
    ),
    *(("_strayed", b, "batch: packed sequences", "takes row i to be sample i") for b in (EW, EXPANDED)),
    *(
        ("_refuse_repeated", b, "tied: one weight in two modules", "is used by 2 module calls")
        for b in (BACKPACK, NNGEOMETRY)
    ),
    ("_refuse_repeated", BACKPACK, "tied: one call detached", "is used by 2 module calls"),
    ("_refuse_shared", TORCHJD, "tied: one weight in two modules", "is used by 2 modules"),
    *(
        ("_pads_with_zeros", b, "Conv2d(padding_mode='reflect')", "would pad with zeros")
        for b in (HOOKS, BACKPACK, NNGEOMETRY)
    ),
    *(
        ("trains_padding", b, "Embedding(padding_idx=0)", "the padding would get a gradient")
        for b in (HOOKS, EW, GHOST, EXPANDED)
    ),
    ("_adds_equal_tokens_once", HOOKS, "EmbeddingBag offsets", "in a bag twice"),
    *(
        ("normalises_anew", b, "InstanceNorm2d running statistics, in eval mode", "not the running ones")
        for b in (EW, EXPANDED)
    ),
    ("_refuse_strides", HOOKS, "input: channels_last", "would misread an input of strides"),
    ("_refuse_strides", HOOKS, "input: channels last, permuted in the model", "would misread an input of strides"),
    ("_refuse_hooked_twice", HOOKS, "tied: a module under two parents", "has several parents"),
    ("_ignores_groups", NNGEOMETRY_GRAM, "Conv2d(groups=2)", "all channels for one group"),
    ("_ignores_eps", NNGEOMETRY, "BatchNorm2d(eps=0.1)", "the default eps"),
    ("_refuse_part_of_a_layer", NNGEOMETRY_GRAM, "GroupNorm(bias=False)", "frozen or left out"),
    ("_pads_its_own_way", BACKPACK, "Conv2d(padding='same')", "would not pad as the layer does"),
    ("_adds_up_groups", BACKPACK_NORMS, "Conv2d(groups=2)", "those of an ungrouped convolution"),
]

NEWER = {"GroupNorm(bias=False)"}  # cases of options that the oldest supported torch lacks


@pytest.mark.filterwarnings("ignore")  # a library's warning is no failure of it
@pytest.mark.parametrize(
    ("rule", "variant", "name", "words"), RULES, ids=lambda v: str(v) if isinstance(v, str) else v[0]
)
def test_each_rule_is_needed(rule: str, variant: Variant, name: str, words: str) -> None:
    backend, options, quantity = variant
    try:
        backend_class(backend).load()
    except Unavailable as absence:
        pytest.skip(str(absence))
    case = next((c for c in all_cases() if c.name == name), None)
    if case is None and name in NEWER:
        pytest.skip(f"torch {torch.__version__} has no such option")
    assert case is not None
    setup = case.build()
    args = (setup.inputs, setup.targets)
    with pytest.raises(Unsupported, match=re.escape(words)):
        getattr(get_backend(backend, **options), quantity)(setup.model, setup.loss_fn)(*args)
    with unguarded(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)  # a permutation that moves every sample
        result = getattr(get_backend(backend, **options), quantity)(setup.model, setup.loss_fn)(*args)
    problem = Problem(setup.model, setup.loss_fn, *args, *args)
    finding = Referee(problem, quantity, {}, RULE).same_function(result)
    assert finding.status in ("disagrees", "nonfinite"), "the library is right without the rule"
    assert finding.agreement is not None or finding.status == "nonfinite", "the form alone would show it"


def docstrings_with_cases() -> Iterator[tuple[str, str]]:
    """Yield the function and the case, for every case that a rule's docstring names."""
    rule = re.compile(r'^def (\w+)\([^\n]*\n    """(Cases? ".*?)"""', re.DOTALL | re.MULTILINE)
    for file in README.parent.glob("*.py"):
        for name, text in rule.findall(file.read_text(encoding="utf-8")):
            yield from ((name, case) for case in re.findall(r'"([^"]+)"', text))


def test_every_case_that_a_rule_names_proves_it_here() -> None:
    named = set(docstrings_with_cases())
    assert len({rule for rule, _ in named}) >= 15
    assert named - {(rule, case) for rule, _, case, _ in RULES} == set()


def test_every_rule_here_says_which_case_proves_it() -> None:
    named = {rule for rule, _ in docstrings_with_cases()}
    assert {rule for rule, *_ in RULES} - named == set()


def test_backends_are_guarded_unless_said_otherwise() -> None:
    assert guarded()
    with unguarded():
        assert not guarded()
    assert guarded()


def test_packed_sequences_do_not_mind_what_the_default_device_is() -> None:
    (case,) = choose_cases("batch: packed sequences, in order")
    setup = case.build()
    fn = get_backend("expanded_weights").grads(setup.model, setup.loss_fn)
    with torch.device("meta"):
        found = fn(setup.inputs, setup.targets)
    assert_close(found, get_backend("naive").grads(setup.model, setup.loss_fn)(setup.inputs, setup.targets))
