"""What the tests of experiments start from, and how they read an error."""

from collections.abc import Callable
from typing import Any

import pytest

from testbed.config.experiment import Experiment
from testbed.config.yaml_source import ConfigError

BASE = "model: mlp\ndata: random\nloss: nll\n"
EVERYTHING = """
description: 1 line # and a comment
model: {mlp: {hidden: [64, 64]}}
data: {random: {shape: [3, 8, 8], classes: 5}}
loss: {cross_entropy: {label_smoothing: 1e-5}}
batch_size: 8
seed: 3
train_steps: 2
dtype: float64
device: cpu
tf32: true
problems: [{batch_size: 4}, {model: logistic, seed: [1, 2]}]
quantities: [grads, {clipped_sum: {max_norm: [0.5, 1]}}]
backends: [vmap, {vmap: {chunk_size: [3, 4]}}, {opacus: {mode: ew}}]
exclude: [{backend: {vmap: {chunk_size: 3}}, seed: [1, 2]}, {quantity: grads, model: mlp}]
baseline: vmap
agreement: {allclose: {atol: 1e-5, rtol: 0}}
timing: {rounds: 3, max_s: 1.5, warmup: 0, precision: 0.1}
limits: {timeout_s: 60, memory_gb: 2.5}
size: large
sizes: {large: {seed: 4}, small: {batch_size: 1}}
published: [{source: a paper, hardware: a GPU, what: it is fast, figure: 2.5, backend: vmap, quantity: grads}]
expect: {opacus(mode=ew): ok, vmap: unsupported}
"""


def error_of(load: Callable[..., Experiment], *arguments: Any) -> str:
    """Return the one line that loading ends with."""
    with pytest.raises(ConfigError) as raised:
        load(*arguments)
    message = str(raised.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message
