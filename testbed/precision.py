"""How far is each backend from the truth, in each dtype? Errors sample by sample, and one case of cancellation.

The distribution of ‖g_i − t_i‖ / ‖t_i‖ over the samples of a batch says what one number cannot: whether a backend is
as exact as its dtype on every sample, or far off on a few that sit on a kink.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backends import get_backend, variants
from backends.base import first_line
from testbed.agreement import Calibrated
from testbed.outcome import status_of
from testbed.problems import Problem
from testbed.records import with_options
from testbed.referee import Referee


@dataclass(frozen=True)
class Errors:
    """The errors of one backend in one dtype.

    Attributes:
        backend: Name and options.
        dtype: The dtype it ran in.
        status: That of the default rule, or of what the backend raised; a record's.
        reason: What is wrong, or why there are no errors.
        samples: The samples that were checked; empty where there is nothing to compare.
        relative: ‖g_i − t_i‖ / ‖t_i‖ for each of them.
        ill_conditioned: Those that only a kink excuses.
    """

    backend: str
    dtype: str
    status: str
    reason: str = ""
    samples: tuple[int, ...] = ()
    relative: tuple[float, ...] = ()
    ill_conditioned: tuple[int, ...] = ()


def measure(
    problem: Problem,
    dtypes: Sequence[str],
    backends: Sequence[tuple[str, dict[str, Any]]] | None = None,
    step: Callable[[str], None] = lambda what: None,
    found: list[Errors] | None = None,
) -> list[Errors]:
    """Measure backends in every dtype on one problem.

    Args:
        problem: The problem; it is converted to each dtype.
        dtypes: Such as "float32", "bfloat16", "float16".
        backends: Names and options; every backend with every choice of its options if None.
        step: Hears what is being measured.
        found: An empty list, for a caller who wants what was found if this is interrupted.
    """
    found = [] if found is None else found
    for dtype in dtypes:
        run = problem.to(getattr(torch, dtype))
        referee = Referee(run, "grads", {}, Calibrated())
        for name, options in backends or variants("grads"):
            step(f"{dtype}, {with_options(name, options)}")
            found.append(_errors(run, referee, name, options, dtype))
    return found


def _errors(run: Problem, referee: Referee, name: str, options: dict[str, object], dtype: str) -> Errors:
    label = with_options(name, options)
    try:
        result = get_backend(name, **options).grads(run.model, run.loss_fn)(run.inputs, run.targets)
    except Exception as error:  # whatever a library may raise
        status, reason = status_of(error)
        if status == "error" and isinstance(error, RuntimeError):  # a kernel that the dtype lacks
            status, reason = "unsupported", first_line(error)
        return Errors(label, dtype, status, reason)
    finding = referee.precision(result)
    if finding.agreement is None:
        return Errors(label, dtype, finding.status, finding.diagnosis)
    samples, relative = zip(*finding.agreement.errors, strict=True)
    ill = finding.agreement.ill_conditioned
    return Errors(label, dtype, finding.status, finding.diagnosis, samples, relative, ill)


@dataclass(frozen=True)
class Cancellation:
    """Relative errors of a linear layer's squared gradient norm, by two formulas.

    Attributes:
        dtype: The dtype of the pairs.
        gram: By Σ_ts ⟨a_t, a_s⟩⟨g_t, g_s⟩, as ghost clipping does.
        direct: By ‖Σ_t g_t a_tᵀ‖², materialised.
        negative: How many of the Gram results are below zero.
    """

    dtype: str
    gram: float
    direct: float
    negative: int


def cancellation(dtype: torch.dtype, positions: int = 1024, width: int = 64, samples: int = 16) -> Cancellation:
    """Measure what the Gram formula loses: near-constant activations, gradients that nearly sum to zero.

    The T² products of the Gram formula (Li et al. 2022, arXiv:2110.05679) then cancel almost completely; clamping the
    result at zero would mean that the sample is not clipped at all.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    a = normal(samples, 1, width) + 1e-2 * normal(samples, positions, width)
    g = normal(samples, positions, width)
    g = (g - g.mean(1, keepdim=True)).to(dtype)
    a = a.to(dtype)

    def direct(a: Tensor, g: Tensor) -> Tensor:
        return torch.einsum("ntp,ntd->npd", g, a).square().sum((1, 2))

    truth = direct(a.double(), g.double())
    gram = ((a @ a.mT) * (g @ g.mT)).sum((1, 2)).double()
    plain = direct(a, g).double()
    errors = [float(((found - truth).abs() / truth).max()) for found in (gram, plain)]
    return Cancellation(str(dtype).removeprefix("torch."), errors[0], errors[1], int((gram < 0).sum()))
