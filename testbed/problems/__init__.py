"""Problems: a model, a loss and a batch, made from names; add your own with `register_model`, `_data`, `_loss`."""

from testbed.problems import (  # noqa: F401  importing them registers what they hold
    data,
    huggingface,
    losses,
    models,
    text,
    torchvision_models,
    vision,
)
from testbed.problems.base import (
    DATA,
    LOSSES,
    MODELS,
    Problem,
    ProblemError,
    Samples,
    make_problem,
    register_data,
    register_loss,
    register_model,
)

__all__ = [
    "DATA",
    "LOSSES",
    "MODELS",
    "Problem",
    "ProblemError",
    "Samples",
    "make_problem",
    "register_data",
    "register_loss",
    "register_model",
]
