"""Every mistake in an experiment is one line with its place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends import available
from backends.base import QUANTITIES
from testbed.agreement import RULES
from testbed.config.expand import MAX_CELLS
from testbed.config.experiment import Workload
from testbed.config.load import keys, load_experiment
from testbed.config.yaml_source import MAX_BYTES
from testbed.problems import DATA, LOSSES, MODELS
from testbed.records import STATUSES
from tests.yaml_texts import BASE, error_of

HERE = "▸"  # in a YAML text below: where the error must point


def bomb(levels: int) -> str:
    """Return anchors that stand for 9 ** levels values."""
    lines = ["a0: &a0 x"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


KEYS = f"allowed: {', '.join(keys())}"
OF_A_PROBLEM = f"allowed: {', '.join(Workload.model_fields)}"
OF_EXCLUDE = f"allowed: backend, quantity, {', '.join(Workload.model_fields)}"
TWO = BASE + "backends: [naive, vmap]\nbatch_size: [1, 4]\n"
CHOICE = "should be a name, or {name: {option: value}}"
TAG = "is not allowed; an experiment holds names, numbers and lists"
EXPECTED = "expected keys such as 'model', 'data' and 'loss', found"
TOO_MANY = "more than 10000 values, aliases expanded"

MISTAKES = {
    # keys
    "misspelt key": (BASE + "▸bacth_size: 3", f"unknown key 'bacth_size' (did you mean 'batch_size'?); {KEYS}"),
    "misspelt key in place of a required one": (
        "▸modle: mlp\ndata: random\nloss: nll",
        f"unknown key 'modle' (did you mean 'model'?); {KEYS}",
    ),
    "unknown key": (BASE + "▸xyz: 3", f"unknown key 'xyz'; {KEYS}"),
    "misspelt key in a mapping": (
        BASE + "timing: {max_s: 3, ▸round: 3}",
        "unknown key 'round' (did you mean 'rounds'?); allowed: rounds, max_s, warmup",
    ),
    "merge key": (BASE + "▸<<: {batch_size: 3}", "unknown key '<<'"),
    "key is a number": (BASE + "▸3: x", "unknown key '3'"),
    "key of two lines": (BASE + '▸"a\\nb": x', "unknown key 'a\\nb'"),
    "key is a list": (BASE + "? ▸[a, b]\n: 3", "a key must be a name"),
    "missing key": ("▸model: mlp\ndata: random", "'loss' is required: The loss, by name;"),
    "duplicate key": (BASE + "seed: 1\n▸model: mlp", "duplicate key 'model', first in line 1"),
    "duplicate key in a mapping": (
        BASE + "timing: {rounds: 3, ▸rounds: 4}",
        "duplicate key 'rounds', first in line 4",
    ),
    # types and ranges
    "negative batch size": (BASE + "batch_size: ▸-1", "'batch_size': should be greater than 0, found -1"),
    "batch size in words": (BASE + "batch_size: ▸many", "'batch_size': should be a whole number, found 'many'"),
    "batch size as text": (BASE + "batch_size: ▸'64'", "'batch_size': should be a whole number, found '64'"),
    "batch size with a point": (BASE + "batch_size: ▸64.0", "'batch_size': should be a whole number, found 64.0"),
    "batch size is a truth value": (BASE + "batch_size: ▸true", "'batch_size': should be a whole number, found True"),
    "batch size is left empty": (BASE + "batch_size:▸", "'batch_size': should be a whole number, found nothing"),
    "batch size with too many digits": (BASE + "batch_size: ▸" + "9" * 5000, "'batch_size': should be a whole number"),
    "seed too large": (BASE + f"seed: ▸{2**63}", f"'seed': should be less than {2**63}, found {2**63}"),
    "NaN": (BASE + "timing: {max_s: ▸.nan}", "'timing.max_s': should be a finite number, found nan"),
    "infinity": (BASE + "timing: {max_s: ▸.inf}", "'timing.max_s': should be a finite number, found inf"),
    "infinity by overflow": (BASE + "timing: {max_s: ▸1e999}", "'timing.max_s': should be a finite number, found inf"),
    "one round": (BASE + "timing: {rounds: ▸1}", "'timing.rounds': should be greater than or equal to 2, found 1"),
    "truth value in YAML 1.1": (BASE + "tf32: ▸on", "'tf32': should be true or false, found 'on'"),
    "unknown device": (BASE + "device: ▸gpu", "'device': should be 'auto', 'cpu' or 'cuda', found 'gpu'"),
    "unknown dtype": (BASE + "dtype: ▸half", "'dtype': should be 'float32', 'float64', 'bfloat16' or 'float16', found"),
    "text is a number": (BASE + "description: ▸3", "'description': should be text, found 3"),
    "name in place of a list": (BASE + "backends: ▸naive", "'backends': should be a list, [a, b], found 'naive'"),
    "empty list": (BASE + "backends: ▸[]", "'backends': should have at least one item, found []"),
    "list in place of a mapping": (BASE + "timing: ▸[3]", "'timing': should be a mapping, {key: value}, found [3]"),
    "mapping left empty": (BASE + "timing:▸\n", "'timing': should be a mapping, {key: value}, found nothing"),
    "number in place of a name": ("model: ▸3\ndata: random\nloss: nll", f"'model': {CHOICE}, found 3"),
    "list in place of a name in a list": (
        "model: [mlp, ▸[mlp]]\ndata: random\nloss: nll",
        f"'model': {CHOICE}, found ['mlp']",
    ),
    "two names": ("model: ▸{a: {}, b: {}}\ndata: random\nloss: nll", f"'model': {CHOICE}, found {{'a': {{}}, 'b'"),
    "number in place of options": (
        "model: ▸{mlp: 3}\ndata: random\nloss: nll",
        f"'model': {CHOICE}, found {{'mlp': 3}}",
    ),
    "long value is cut": (
        BASE + "device: ▸" + "x" * 500,
        f"'device': should be 'auto', 'cpu' or 'cuda', found '{'x' * 76}...",
    ),
    # names and options
    "unknown model": ("model: ▸mpl\ndata: random\nloss: nll", "unknown model 'mpl' (did you mean 'mlp'?); available: "),
    "unknown data": (
        "model: mlp\ndata: ▸digit\nloss: nll",
        "unknown data 'digit' (did you mean 'digits'?); available: ",
    ),
    "unknown loss": ("model: mlp\ndata: random\nloss: ▸NLL", "unknown loss 'NLL' (did you mean 'nll'?); available: "),
    "unknown rule": (BASE + "agreement: ▸allclos", "unknown agreement rule 'allclos' (did you mean 'allclose'?); "),
    "unknown backend": (
        BASE + "backends: [naive, ▸vmpa]",
        "unknown backend 'vmpa' (did you mean 'vmap'?); available: ",
    ),
    "unknown backend with options": (
        BASE + "backends:\n  - naive\n  - ▸{vmpa: {chunk_size: 3}}",
        "unknown backend 'vmpa' (did you mean 'vmap'?); available: ",
    ),
    "unknown quantity": (BASE + "quantities: [▸norm]", "unknown quantity 'norm' (did you mean 'norms'?); available: "),
    "escape code in a name": ('model: ▸"\\e[31m"\ndata: random\nloss: nll', "unknown model '\\x1b[31m'; available: "),
    "unknown option of a model": (
        "model: {mlp: {▸hiden: [3]}}\ndata: random\nloss: nll",
        "model 'mlp' has no option 'hiden' (did you mean 'hidden'?); options: hidden",
    ),
    "option of a backend that has none": (
        BASE + "backends: [{naive: {▸mode: ew}}]",
        "backend 'naive' has no option 'mode'; options: chunk_size, chunk_bytes, compile, cuda_graph, autocast",
    ),
    "bad choice of a backend's option": (
        BASE + "backends: [naive, {opacus: {mode: ▸hook}}]",
        "backend 'opacus', option 'mode': should be 'hooks', 'functorch' or 'ew', found 'hook'",
    ),
    "backend's option out of range": (
        BASE + "backends: [naive, {vmap: {chunk_size: ▸0}}]",
        "backend 'vmap', option 'chunk_size': should be greater than 0, found 0",
    ),
    "backend's option of the wrong type": (
        BASE + "backends: [naive, {vmap: {randomness: same, chunk_size: ▸all}}]",
        "backend 'vmap', option 'chunk_size': should be a whole number, found 'all'",
    ),
    "option deep in a list": (
        "model: mlp\ndata:\n  random:\n    shape:\n      - 1\n      - ▸-28\nloss: nll",
        "data 'random', option 'shape.1': should be greater than 0, found -28",
    ),
    "option is no list": (
        "model: {mlp: {hidden: ▸3}}\ndata: random\nloss: nll",
        "model 'mlp', option 'hidden': should be a list, [a, b], found 3",
    ),
    "quantity's option": (
        BASE + "quantities: [{clipped_sum: {max_norm: ▸.inf}}]",
        "quantity 'clipped_sum', option 'max_norm': should be a finite number, found inf",
    ),
    "rule's option": (
        BASE + "agreement: {allclose: {atol: ▸tight}}",
        "agreement rule 'allclose', option 'atol': should be a number, found 'tight'",
    ),
    "backend twice": (BASE + "backends: [naive, vmap, ▸naive]", "backend 'naive' is listed twice"),
    "backend twice with the same options": (
        BASE + "backends: [{opacus: {mode: ew}}, opacus, ▸{opacus: {mode: ew}}]",
        "backend 'opacus(mode=ew)' is listed twice",
    ),
    "quantity twice": (BASE + "quantities: [grads, ▸grads]", "quantity 'grads' is listed twice"),
    "baseline that is not run": (
        BASE + "backends: [naive, vmap]\nbaseline: ▸opacus",
        "unknown baseline 'opacus'; available: naive, vmap in this experiment",
    ),
    "expectation of a backend that is not run": (
        BASE + "backends: [naive, vmap]\nexpect: {▸vmpa: ok}",
        "unknown backend 'vmpa' (did you mean 'vmap'?); available: naive, vmap in this experiment",
    ),
    "expectation of an unknown status": (
        BASE + "expect: {vmap: ▸okay}",
        "unknown status 'okay' (did you mean 'ok'?); available: ",
    ),
    # sweeps
    "sweep of nothing": (BASE + "batch_size: ▸[]", "'batch_size': should have at least one item, found []"),
    "sweep of an option over nothing": (
        BASE + "backends: [{opacus: {mode: ▸[]}}]",
        "'backends.0.opacus.mode': should have at least one item, found []",
    ),
    "wrong item of a sweep": (BASE + "batch_size: [1, ▸0]", "'batch_size': should be greater than 0, found 0"),
    "list in a sweep": (BASE + "batch_size: [1, ▸[2]]", "'batch_size': should be a whole number, found [2]"),
    "unknown name in a sweep": (
        "model: [mlp, ▸mpl]\ndata: random\nloss: nll",
        "unknown model 'mpl' (did you mean 'mlp'?); available: ",
    ),
    "wrong item of an option's sweep": (
        BASE + "backends: [naive, {opacus: {mode: [ew, ▸hook]}}]",
        "backend 'opacus', option 'mode': should be 'hooks', 'functorch' or 'ew', found 'hook'",
    ),
    "wrong item of an option's sweep in a sweep": (
        "model: [logistic, {mlp: {hidden: [[8], [8, ▸0]]}}]\ndata: random\nloss: nll",
        "model 'mlp', option 'hidden.1': should be greater than 0, found 0",
    ),
    "wrong item of a quantity's sweep": (
        BASE + "quantities: [grads, {clipped_sum: {max_norm: [1, ▸-1]}}]",
        "quantity 'clipped_sum', option 'max_norm': should be greater than 0, found -1",
    ),
    "neither list nor list of lists": (
        "model: {mlp: {hidden: [[8], ▸8]}}\ndata: random\nloss: nll",
        "model 'mlp', option 'hidden': should be a list, [a, b], found 8",
    ),
    "problem twice": (BASE + "batch_size: [1, 4, ▸1]", "problem 'mlp, random, nll, N=1, float32' is listed twice"),
    "backend twice by a sweep": (
        BASE + "backends: [{opacus: {mode: ew}}, {opacus: {mode: [hooks, ▸ew]}}]",
        "backend 'opacus(mode=ew)' is listed twice",
    ),
    "too many problems": (
        BASE + f"batch_size: [▸{', '.join(map(str, range(1, 2002)))}]\nseed: [1, 2, 3, 4, 5]",
        f"lists stand for more than {MAX_CELLS} combinations",
    ),
    "too many cells": (
        "▸" + BASE + f"batch_size: [{', '.join(map(str, range(1, 2002)))}]\nquantities: [norms, gram, grads]",
        f"{2001 * 3 * len(available())} cells (problem × quantity × backend); at most {MAX_CELLS}",
    ),
    # problems
    "problems are no list": (BASE + "problems: ▸mlp", "'problems': should be a list of mappings, such as ["),
    "no problems": (BASE + "problems: ▸[]", "'problems': should have at least one item, found []"),
    "problem is a name": (BASE + "problems: [▸mlp]", "'problems.0': should be a list of mappings, such as ["),
    "misspelt key of a problem": (
        BASE + "problems: [{▸modle: mlp}]",
        f"unknown key 'modle' (did you mean 'model'?); {OF_A_PROBLEM}",
    ),
    "key that is not a problem's": (
        BASE + "problems: [{▸timing: {rounds: 3}}]",
        "unknown key 'timing'; allowed: model",
    ),
    "problem without data": (
        "loss: nll\nproblems:\n  - {model: mlp, data: random}\n  - ▸{model: mlp}",
        "'data' is required: The data, by name;",
    ),
    "wrong value in a problem": (
        BASE + "problems: [{batch_size: 1}, {batch_size: ▸x}]",
        "'batch_size': should be a whole number, found 'x'",
    ),
    "unknown name in a problem": (
        BASE + "problems: [{seed: 1}, {model: [mlp, ▸mpl]}]",
        "unknown model 'mpl' (did you mean",
    ),
    "unknown option in a problem": (
        BASE + "problems: [{seed: 1}, {model: {mlp: {▸hiden: [3]}}}]",
        "model 'mlp' has no option 'hiden' (did you mean 'hidden'?)",
    ),
    "problem listed twice": (
        BASE + "problems: [{batch_size: 64}, ▸{seed: 0}]",
        "problem 'mlp, random, nll, N=64, float32' is listed twice",
    ),
    "key that every problem has": (
        "▸" + BASE + "problems: [{model: mlp}, {model: logistic}]",
        "'model' says nothing: every entry of 'problems' has its own; leave it out here or there",
    ),
    # exclude
    "exclude is no list": (TWO + "exclude: ▸{backend: vmap}", "'exclude': should be a list, [a, b], found {'backend'"),
    "entry is no mapping": (TWO + "exclude: [▸vmap]", "'exclude.0': should be a mapping, {key: value}, found 'vmap'"),
    "entry is empty": (TWO + "exclude: [▸{}]", f"should ask for something, found {{}}; {OF_EXCLUDE}"),
    "misspelt key of exclude": (
        TWO + "exclude: [{▸bacend: vmap}]",
        f"unknown key 'bacend' (did you mean 'backend'?); {OF_EXCLUDE}",
    ),
    "backend to exclude is unknown": (
        TWO + "exclude: [{backend: ▸vmpa}]",
        "unknown backend 'vmpa' (did you mean 'vmap'?); available: naive, vmap in this experiment",
    ),
    "backend to exclude has no such option": (
        TWO + "exclude: [{backend: ▸{vmap: {chunk_size: 3}}}]",
        "unknown backend 'vmap(chunk_size=3)'; available: naive, vmap in this experiment",
    ),
    "options to exclude are none": (
        TWO + "exclude: [{backend: ▸{vmap: 3}}]",
        "unknown backend '{'vmap': 3}'; available: naive, vmap in this experiment",
    ),
    "one of those to exclude is unknown": (
        TWO + "exclude: [{backend: [vmap, ▸opacus]}]",
        "unknown backend 'opacus'; available: naive, vmap in this experiment",
    ),
    "none of a list to exclude": (
        TWO + "exclude: [{backend: ▸[]}]",
        "'backend': should have at least one item, found []",
    ),
    "batch size to exclude is not there": (
        TWO + "exclude: [{backend: vmap}, {batch_size: ▸16}]",
        "unknown batch_size '16'; available: 1, 4 in this experiment",
    ),
    "batch size to exclude is text": (
        TWO + "exclude: [{batch_size: ▸'4'}]",
        "unknown batch_size '4'",
    ),
    "nothing to exclude": (TWO + "exclude: [{dtype:▸ }]", "unknown dtype 'nothing'; available: float32 in this"),
    "combination to exclude is not there": (
        BASE + "problems: [{batch_size: 4}, {model: logistic}]\nexclude: [{model: logistic, batch_size: ▸4}]",
        "unknown batch_size '4'; available: 64 where model is logistic",
    ),
    "all is excluded": (TWO + "exclude: ▸[{backend: naive}, {backend: vmap}]", "'exclude' leaves no cell to run"),
    # what is no experiment, or no YAML
    "empty file": ("▸", f"{EXPECTED} nothing"),
    "only a comment": ("▸# model: mlp\n\n", f"{EXPECTED} nothing"),
    "null": ("▸null", f"{EXPECTED} nothing"),
    "list at top level": ("# a list\n▸- model\n- data", f"{EXPECTED} a list"),
    "text": ("▸hello", f"{EXPECTED} text"),
    "number": ("▸3", f"{EXPECTED} a number"),
    "two documents": (f"{BASE}---\n▸{BASE}", "a second document; one file holds one experiment"),
    "tag of Python": ("model: ▸!!python/object:os.system ls", f"the tag '!!python/object:os.system' {TAG}"),
    "tag of Python in a key": ("? ▸!!python/name:os.system x\n: 3", f"the tag '!!python/name:os.system' {TAG}"),
    "own tag": ("model: ▸!foo mlp", f"the tag '!foo' {TAG}"),
    "tag of a number": (BASE + "batch_size: ▸!!int '3'", f"the tag '!!int' {TAG}"),
    "exploding anchors": (bomb(12).replace("a5:", "▸a5:"), TOO_MANY),
    "too many values": (f"a: b\n▸c: [{'x, ' * 10000}]", TOO_MANY),
    "anchor that holds itself": ("model: ▸&m [*m]", "an alias refers to what contains it"),
    "unknown anchor": ("model: ▸*m", "not YAML: found undefined alias 'm'"),
    "nested too deeply": (f"a: {'[' * 50}▸[{']' * 51}", "nested too deeply; at most 50 levels are allowed"),
    "deeper than the parser": ("▸" + "[" * 3000, "nested too deeply; at most 50 levels are allowed"),
    "tab": ("model: mlp\n▸\tdata: random", "not YAML: found character '\\t' that cannot start any token"),
    "colon in a value": ("model: mlp▸: logistic", "not YAML: mapping values are not allowed here"),
    "bracket not closed": ("model: [mlp\n▸", "not YAML: expected ',' or ']', but got '<stream end>'"),
    "control character": ("model: mlp\ndata: a▸\x07", "not YAML: a control character ('\\x07')"),
}


@pytest.mark.parametrize(("yaml", "says"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_one_line_with_its_place(load: Any, tmp_path: Path, yaml: str, says: str) -> None:
    before = yaml.partition(HERE)[0]
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    message = error_of(load, yaml.replace(HERE, ""))
    assert message.startswith(f"{tmp_path / 'e.yaml'}:{line}:{column}: {says}")


@pytest.mark.parametrize(
    ("yaml", "known"),
    [
        ("model: x\ndata: random\nloss: nll", MODELS),
        ("model: mlp\ndata: x\nloss: nll", DATA),
        ("model: mlp\ndata: random\nloss: x", LOSSES),
        (BASE + "agreement: x", RULES),
        (BASE + "quantities: [x]", QUANTITIES),
        (BASE + "backends: [x]", available()),
        (BASE + "expect: {naive: x}", STATUSES),
    ],
    ids=["model", "data", "loss", "agreement", "quantity", "backend", "status"],
)
def test_unknown_name_is_answered_with_all_known_ones(load: Any, yaml: str, known: Any) -> None:
    assert error_of(load, yaml).endswith(f"; available: {', '.join(sorted(known))}")


def write_bytes(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "x.yaml", "no such file"),
    "in no folder": (lambda folder: folder / "no" / "x.yaml", "no such file"),
    "directory": (lambda folder: folder, "is a directory, expected a YAML file"),
    "inside a file": (lambda folder: write_bytes("f", b"")(folder) / "x.yaml", "cannot be read: Not a directory"),
    "name too long": (lambda folder: folder / ("x" * 300), "cannot be read: File name too long"),
    "binary": (write_bytes("x.yaml", b"\x89PNG\r\n\0\xff"), "not a text file (byte 0 is not UTF-8), expected YAML"),
    "Latin-1": (write_bytes("x.yaml", b"model: \xe9"), "not a text file (byte 7 is not UTF-8), expected YAML"),
    "too large": (
        write_bytes("x.yaml", b"#" * (MAX_BYTES + 1)),
        f"larger than {MAX_BYTES} bytes, expected an experiment",
    ),
    "without end": (lambda _: Path("/dev/zero"), f"larger than {MAX_BYTES} bytes, expected an experiment"),
}


@pytest.mark.parametrize(("make", "says"), FILES.values(), ids=FILES)
def test_file_that_cannot_be_read(tmp_path: Path, make: Callable[[Path], Path], says: str) -> None:
    file = make(tmp_path)
    assert error_of(load_experiment, file).startswith(f"{file}: {says}")


def test_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root, as in a container, may read everything
    assert error_of(load_experiment, tmp_path / "x.yaml") == f"{tmp_path / 'x.yaml'}: cannot be read: Permission denied"


def test_missing_file_names_those_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mnist.yaml").touch()
    assert error_of(load_experiment, tmp_path / "mnst.yaml").endswith(f"; there are {tmp_path / 'mnist.yaml'}")
