"""A research testbed for per-sample gradients: many ways, one interface, checked against each other and timed.

    import testbed
    print(testbed.compare(model, loss_fn, inputs, targets))

`python -m testbed experiments/mnist.yaml` does it from the command line.
"""

from importlib.metadata import PackageNotFoundError, version

from backends.base import register as register_backend
from testbed.api import compare
from testbed.problems import register_data, register_loss, register_model
from testbed.report import Report

try:
    __version__ = version("per-sample-gradient-testbed")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0+unknown"

__all__ = ["Report", "compare", "register_backend", "register_data", "register_loss", "register_model"]
