"""`torch.einsum` with a parameter: its rule, against the loop."""

import pytest
import torch
from torch import Tensor, nn

from backends import get_backend
from backends.base import QUANTITIES
from backends.ops.einsum import einsum
from backends.ops.persample import Dense
from tests.asserts import assert_close
from tests.cases import DEVICE, Functional, linear, real, squares
from tests.habits import over_the_batch

pytestmark = pytest.mark.usefixtures("own_random_state")

SIZES = {"n": 6, "t": 2, "d": 5, "h": 3, "k": 4}

EQUATIONS = {
    "to heads": ("ntd,dhk->nthk", True),
    "a matrix, the other way": ("ntd, kd -> ntk", True),
    "vectors": ("nd,d->n", True),
    "more outside": ("...d,dk->...k", True),
    "heads, each by its own": ("nthk,hkd->nthd", False),
    "heads, and more outside": ("...hk,hkd->...hd", False),
    "other order": ("ntd,hdk->nthk", False),
    "summed over": ("nthd,dk->nhk", False),
    "outer": ("n,dk->ndk", True),
    "a number": ("ntd,->ntd", False),
    "time first": ("tnd,dk->tnk", True),
}


def model_of(equation: str, swapped: bool) -> tuple[nn.Module, Tensor]:
    operands, output = equation.split("->")
    x, w = (term.strip() for term in operands.split(","))
    shape = [SIZES[letter] for letter in x.replace("...", "nt")]
    if swapped:
        equation = f"{w},{x}->{output}"

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        h = x.sin().movedim(0, 1) if equation.startswith("tn") or ",tn" in equation else x.sin()
        y = torch.einsum(equation, *((s.w, h) if swapped else (h, s.w)))
        return (y.movedim(0, 1) if output.strip().startswith("tn") else y).reshape(len(x), -1).tanh()

    if equation.startswith("tn") or ",tn" in equation:
        shape[:2] = shape[1], shape[0]
    model = Functional(forward, w=nn.Parameter(real(*(SIZES[letter] for letter in w))))
    return model.to(DEVICE, torch.float64), real(*shape).to(DEVICE)


@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", EQUATIONS)
def test_a_parameter_may_be_either_operand(name: str, quantity: str, swapped: bool) -> None:
    model, x = model_of(EQUATIONS[name][0], swapped)
    ours, loop = (getattr(get_backend(b), quantity)(model, squares) for b in ("bookkeeping", "naive"))
    targets = real(len(x)).to(DEVICE)
    for _ in range(2):  # the second call knows the layout
        assert_close(ours(x, targets), loop(x, targets))
    assert over_the_batch(model, x, targets)


@pytest.mark.parametrize("name", [name for name in EQUATIONS if name != "time first"])
def test_a_matrix_makes_no_gradients_before_they_are_wanted(name: str) -> None:
    equation, is_matrix = EQUATIONS[name]
    x, w = (term.strip() for term in equation.split("->")[0].split(","))
    input, weight = (real(*(SIZES[i] for i in letters.replace("...", "nt"))) for letters in (x, w))
    y = torch.einsum(equation, input, weight)
    found = einsum(torch.ones_like(y)[:, None], equation, input[:, None], weight)["weight"]
    assert isinstance(found, Dense) != is_matrix
    (truth,) = torch.func.vmap(torch.func.vjp(lambda w: torch.einsum(equation, input, w), weight)[1])(
        torch.diag_embed(y.new_ones(len(y))).reshape(len(y), len(y), *[1] * (y.dim() - 1)).expand(-1, *y.shape)
    )
    assert_close(found.rows(slice(None)), truth)


@pytest.mark.parametrize(
    "run",
    [
        lambda x, w: torch.einsum("ndd,de->ne", x[..., :5, None] * x[..., None, :5], w),
        lambda x, w: torch.einsum("nd,ed->n", x, w),
        lambda x, w: torch.einsum("nd,de", x, w),
        lambda x, w: torch.einsum("nd,de,ef->nf", x, w, w),
        lambda x, w: torch.einsum("nd,dd->nd", x, w),
        lambda x, w: torch.einsum("nd,...->n...d", x, w),
        lambda x, w: torch.einsum("nd,de->ne", [x, w]),
        lambda x, w: torch.einsum(x, [0, 1], w, [1, 2], [0, 2]),
    ],
)
def test_what_the_rule_does_not_cover_is_right(run: object) -> None:
    model = Functional(
        lambda s, x: s.a(run(x, s.w).reshape(len(x), -1)[:, :1]), w=nn.Parameter(real(5, 5)), a=linear(1, 3)
    )  # type: ignore[operator]
    model.to(DEVICE, torch.float64)
    ours, loop = (get_backend(b).grads(model, squares) for b in ("bookkeeping", "naive"))
    x, targets = real(6, 5).to(DEVICE), real(6).to(DEVICE)
    assert_close(ours(x, targets), loop(x, targets))
