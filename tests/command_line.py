"""The command line in this process, a small experiment for it, and how it ended."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import testbed.__main__ as command_line

SMALL = """
description: A small one.
model: logistic
data: {random: {shape: [5], classes: 3}}
loss: nll
batch_size: 4
device: cpu
timing: {rounds: 2, max_s: 1}
backends: [naive, vmap]
"""
PLUGIN = """
from dataclasses import dataclass

from backends.base import Backend, Unsupported, register, trainable


@register("mine", requires={})
@dataclass(frozen=True)
class Mine(Backend):
    def grads(self, model, loss_fn):
        ...
"""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run_here(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> Ended:
    """Run a command line in this process, without the child processes that `test_isolation` is about."""
    in_process = ["--in-process"] if arguments and str(arguments[0]).endswith(".yaml") else []
    try:
        code = command_line.main([*map(str, arguments), *in_process])
    except SystemExit as end:  # argparse
        code = int(end.code or 0)
    return Ended(code, *capsys.readouterr())


def message(ended: Ended) -> str:
    """Return what a user error says; it is one line and nothing else."""
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(r"testbed: error: .*\n", ended.err)
    return ended.err.removeprefix("testbed: error: ").rstrip("\n")


def plugin(folder: Path, text: str) -> Path:
    """Write a plug-in."""
    (folder / "plug.py").write_text(text, encoding="utf-8")
    return folder / "plug.py"
