"""What a user of the command line may get wrong: one line that says what, where, and what is allowed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command_line import PLUGIN, message, plugin

MODEL = "from testbed import register_model\n\n@register_model{}\ndef mm({}):\n    ...\n"
BAD_PLUGINS = {
    "syntax error": ("x = 1\ndef f(:\n", "2: SyntaxError: "),
    "raises": ("import json\n\njson.loads('{')\n", "3: JSONDecodeError: "),
    "raises in a function": ("def f():\n    raise ValueError('a\\nb')\n\nf()\n", "2: ValueError: a"),
    "exits": ("import sys\nsys.exit(0)\n", "2: SystemExit: 0"),
    "missing import": ("import no_such_module\n", "1: ModuleNotFoundError: No module named 'no_such_module'"),
    "name of a built-in backend": (PLUGIN.replace("mine", "naive"), "7: ValueError: two backends are named 'naive': "),
    "name of a built-in model": (
        "from testbed import register_model\n\n@register_model('mlp')\ndef mine(example):\n    ...\n",
        "3: ValueError: two models are named 'mlp': ",
    ),
    "option whose type is for type checkers": (
        PLUGIN.replace("    def grads", "    size: 'Sizes' = 1\n\n    def grads"),
        "7: NameError: the type of an option of backend 'mine': name 'Sizes' is not defined",
    ),
    "no backend": (
        "from backends.base import register\n\n@register('x')\nclass X: ...\n",
        "3: TypeError: backend 'x' must be a class derived from Backend",
    ),
    "option without a type": (
        MODEL.format("('mm')", "example, *, width=3"),
        "3: option 'width' of model 'mm' needs a type",
    ),
    "option that is not keyword-only": (
        MODEL.format("('mm')", "example, width"),
        "3: 'width' of model 'mm': options are keyword-only; write (example, *, width: TYPE)",
    ),
    "model that takes nothing": (MODEL.format("('mm')", ""), "3: model 'mm' is given (example), found mm()"),
    "model without a name": (
        MODEL.format("", "example"),
        '3: @register_model needs a name in brackets: @register_model("mm")',
    ),
    "binary": ("\0", " SyntaxError: source code "),
}  # the text, and where and what the error is


class TestUserErrors:
    """Exit code 2 and one line, before anything is built or written."""

    def test_mistake_in_the_yaml(self, call: Any, small: Path) -> None:
        small.write_text("modle: mlp", encoding="utf-8")
        assert message(call(small)).startswith(f"{small}:1:1: unknown key 'modle' (did you mean 'model'?)")

    def test_mistake_in_set(self, call: Any, small: Path) -> None:
        assert message(call(small, "--set", "batch_size=0")).startswith("--set batch_size=0: 'batch_size': should be")

    def test_unknown_only(self, call: Any, small: Path) -> None:
        assert message(call(small, "--only", "vmpa")).startswith(
            "--only: unknown backend 'vmpa' (did you mean 'vmap'?)"
        )

    def test_file_that_is_not_there(self, call: Any, small: Path) -> None:
        assert message(call("smal.yaml")) == "smal.yaml: no such file; there are small.yaml"

    def test_file_that_is_not_there_among_many(self, call: Any, small: Path) -> None:
        for i in range(8):
            (small.parent / f"a{i}.yaml").touch()
        few = ", ".join(f"a{i}.yaml" for i in range(5))
        assert message(call("nothere.yaml")) == f"nothere.yaml: no such file; there are {few}, … (9 in all)"
        assert message(call("smal.yaml")) == "smal.yaml: no such file; there are small.yaml"

    def test_experiment_named_without_its_folder(self, call: Any, small: Path) -> None:
        (small.parent / "experiments").mkdir()
        (small.parent / "experiments" / "lists.yaml").touch()
        found = message(call("lists"))
        assert found == "lists: no such file or command; did you mean experiments/lists.yaml?"

    @pytest.mark.parametrize(("word", "meant"), [("lsit", "list"), ("doctr", "doctor")])
    def test_misspelt_command(self, call: Any, word: str, meant: str) -> None:
        said = message(call(word))
        assert said.startswith(f"unknown command '{word}' (did you mean '{meant}'?); available: calibrate, ")

    @pytest.mark.parametrize(
        ("command", "option"),
        [
            ("small.yaml", "--out"),
            ("small.yaml", "--resume"),
            ("small.yaml", "--only"),
            ("frontier small.yaml", "--out"),
            ("frontier small.yaml", "--only"),
            ("conformance", "--out"),
            ("conformance", "--backend"),
            ("conformance", "--quantity"),
            ("calibrate", "--model"),
            ("precision small.yaml", "--dtype"),
            ("report run", "--out"),
        ],
    )
    def test_option_left_empty(self, call: Any, small: Path, command: str, option: str) -> None:
        """A variable of a shell that is not set must not mean "all", or "here"."""
        code, out, err = call(*command.split(), option, "")
        assert (code, out) == (2, "")
        assert re.search(f"error: argument {option}: should (be names|name a folder).*, found ''", err.splitlines()[-1])
        assert list(small.parent.iterdir()) == [small]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_cuda_without_a_gpu(self, call: Any, small: Path) -> None:
        assert message(call(small, "--device", "cuda")).startswith("device 'cuda': PyTorch finds no CUDA device here")
        assert list(small.parent.iterdir()) == [small]

    def test_out_that_holds_a_run(self, call: Any, small: Path) -> None:
        (small.parent / "run").mkdir()
        (small.parent / "run" / "results.jsonl").write_text("{}\n", encoding="utf-8")
        assert (
            message(call(small, "--out", "run"))
            == "--out run: holds a run already; give another folder, or go on with --resume"
        )

    @pytest.mark.parametrize("out", ["small.yaml", "small.yaml/run"])
    def test_out_that_cannot_be_made(self, call: Any, small: Path, out: str) -> None:
        assert message(call(small, "--out", out)).startswith(f"--out {out}: cannot be made: ")

    def test_problem_that_does_not_fit(self, call: Any, small: Path) -> None:
        ended = call(small, "--set", "model=simple_cnn")
        assert ended.code == 2
        assert ended.err.endswith("model 'simple_cnn' takes 1×28×28 inputs with 10 outputs, the data has 5 with 3\n")

    def test_folder_of_a_run_that_never_began_can_be_used(self, call: Any, small: Path) -> None:
        assert call(small, "--set", "model=simple_cnn", "--out", "run").code == 2
        assert call(small, "--only", "naive", "--out", "run").code == 0

    @pytest.mark.parametrize(("text", "says"), BAD_PLUGINS.values(), ids=BAD_PLUGINS)
    def test_plugin(self, call: Any, small: Path, text: str, says: str) -> None:
        file = plugin(small.parent, text)
        assert message(call(small, "--plugin", file)).startswith(f"{file}:{says}")

    @pytest.mark.parametrize("command", [["list"], ["small.yaml"]], ids=["list", "run"])
    def test_missing_plugin(self, call: Any, small: Path, command: list[str]) -> None:
        assert message(call(*command, "--plugin", "x.py")) == "x.py: FileNotFoundError: no plugin file x.py"

    def test_error_in_what_a_plugin_imports_is_placed_in_the_plugin(
        self, call: Any, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (small.parent / "helper_of_plug.py").write_text("x = 1\n\n\ndef f(:\n", encoding="utf-8")
        monkeypatch.syspath_prepend(small.parent)
        file = plugin(small.parent, "import helper_of_plug\n")
        said = message(call(small, "--plugin", file))
        assert re.match(rf"{file}:1: SyntaxError: .*helper_of_plug.py, line 4", said)
