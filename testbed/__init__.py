"""A research testbed for per-sample gradients: many ways, one interface, checked against each other and timed.

    import testbed
    print(testbed.compare(model, loss_fn, inputs, targets))

`python -m testbed experiments/mnist.yaml` does it from the command line.
"""

from importlib.metadata import PackageNotFoundError, version
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backends.base import register as register_backend
    from testbed.api import compare
    from testbed.problems import register_data, register_loss, register_model
    from testbed.report import Report

try:
    __version__ = version("per-sample-gradient-testbed")
except PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0+unknown"

__all__ = ["Report", "compare", "register_backend", "register_data", "register_loss", "register_model"]

_PLACES = {
    "Report": "testbed.report:Report",
    "compare": "testbed.api:compare",
    "register_backend": "backends.base:register",
    "register_data": "testbed.problems:register_data",
    "register_loss": "testbed.problems:register_loss",
    "register_model": "testbed.problems:register_model",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  whatever is asked for
    """Import what is asked for when it is asked for, so that the command line is there before PyTorch is."""
    if name in _PLACES:
        return resolve_name(_PLACES[name])
    raise AttributeError(f"module 'testbed' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
