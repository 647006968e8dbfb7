"""What whole-model cases are made of: a row of their tables, and what people write around the layers."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Linear
from torch.nn.utils import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from backends.base import LossFn
from backends.batch import Batch
from testbed.conformance.case import Case, D, Forward, K, N, Net, Setup, T, case, real, squared_error, tokens

Parts: TypeAlias = Mapping[str, nn.Module | Tensor]

flat, sequence, square, image = (partial(real, N, *s) for s in ((D,), (T, D), (N, D), (2, 8, 7)))
words, labels, scores = partial(tokens, 7, N, T), partial(tokens, K, N), partial(real, N, K)
entropy = partial(F.cross_entropy, reduction="none")
again = partial(checkpoint, use_reentrant=False)


def headed(**parts: nn.Module | Tensor) -> Parts:
    """Return the parts and `out`, a Linear from D to K."""
    return {"out": Linear(D, K), **parts}


def two(**more: nn.Module | Tensor) -> Parts:
    """Return the parts of most models: `a`, a Linear from D to D, and `out`."""
    return headed(**{"a": Linear(D, D), **more})


def row(
    name: str,
    reason: str,
    function: Forward = lambda m, x: m.out(m.a(x).sin()),
    parts: Callable[[], Parts] = two,
    inputs: Callable[[], Batch] = flat,
    targets: Callable[[], Tensor] = scores,
    loss: LossFn = squared_error,
    training: bool = True,
) -> Case:
    """Return the case of a model that is `function` of its `parts`."""

    def make() -> Setup:
        return Setup(Net(function, **parts()).train(training), loss, inputs(), targets())

    return case(name, "model", name, make, reason)


def raw(*shape: int) -> nn.Parameter:
    """Return a parameter that no layer owns."""
    return nn.Parameter(torch.randn(shape))


def sharing(module: nn.Module, other: nn.Module) -> nn.Module:
    """Return the module with the other's weight."""
    module.weight = other.weight
    return module


def frozen(module: nn.Module, ending: str = "") -> nn.Module:
    """Return the module without gradients for the parameters whose names end so."""
    for name, p in module.named_parameters():
        p.requires_grad_(not name.endswith(ending))
    return module


def hooked(module: nn.Module, before: bool) -> nn.Module:
    """Return the module with a hook that triples its input or its output."""
    if before:
        module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3,))
    else:
        module.register_forward_hook(lambda _, __, output: output * 3)
    return module


def doubled(module: nn.Module) -> nn.Module:
    """Return the module with a hook that doubles the gradient of its input."""

    def double(_: nn.Module, grads: Any, __: object) -> Any:  # noqa: ANN401  torch's own names differ by version
        return (2 * grads[0],)

    module.register_full_backward_hook(double)
    return module


def plain(module: nn.Module) -> nn.Module:
    """Return the module with its computed weight detached, for torch copies no module that holds a computed tensor."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    module.weight = weight.detach()  # a pre-hook computes it anew
    return module


def old_weight_norm(module: nn.Module) -> nn.Module:
    """Return the module under the old weight_norm, without the warning that it is old: models still have it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(module)


class Scaled(Linear):
    """A Linear with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Return three times the output."""
        return 3 * super().forward(x)


class Cube(torch.autograd.Function):
    """x³ w, with a backward of its own and no rule for vmap."""

    @staticmethod
    def forward(ctx: torch.autograd.function.BackwardCFunction, x: Tensor, w: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, w)
        return x**3 * w

    @staticmethod
    def backward(ctx: torch.autograd.function.BackwardCFunction, g: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        x, w = tuple(ctx.saved_tensors)
        return g * 3 * x**2 * w, (g * x**3).sum(0)


def under_no_grad(module: Forward, x: Tensor) -> Tensor:
    """Return module(x) without a graph."""
    with torch.no_grad():
        return module(x)


def under_autocast(module: Forward, x: Tensor) -> Tensor:
    """Return module(x) under autocast, back in x's dtype."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return module(x).to(x)


def slope(module: Forward, x: Tensor, differentiable: bool = True) -> Tensor:
    """Return the gradient [N, D] of each sample's output by its input, itself differentiable or not."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(module(x).square().sum(), x, create_graph=differentiable)[0]


def gradient_times(factor: float, y: Tensor) -> Tensor:
    """Return y, with a hook that multiplies its gradient."""
    y.register_hook(lambda grad: factor * grad)
    return y


def attention(qkv: Tensor, causal: bool = False) -> Tensor:
    """Return attention [N, T, D] in one head, of queries, keys and values in one tensor [N, T, 3 D]."""
    q, k, v = qkv[:, None].chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)[:, 0]


def put_zero(y: Tensor) -> Tensor:
    """Return y with its first column set to zero, in place."""
    y[:, 0] = 0
    return y


def in_order(module: Forward, x: Tensor) -> Tensor:
    """Return module(x), called on the samples in the order of their first feature."""
    order = x[:, 0].argsort()
    return module(x[order])[order.argsort()]


def shuffled(module: Forward, x: Tensor) -> Tensor:
    """Return module(x), called on the samples in an order drawn at random."""
    order = torch.randperm(len(x), device=x.device)
    return module(x[order])[order.argsort()]


def routed(x: Tensor, *experts: Forward) -> Tensor:
    """Return for each sample the output of the one expert that its first feature picks."""
    y = torch.zeros_like(x)
    for i, expert in enumerate(experts):
        mine = (x[:, 0] > 0) == bool(i)
        y = y.index_put((mine,), expert(x[mine]))
    return y


def packed(module: nn.RNNBase, x: Tensor, lengths: Tensor, ordered: bool = False) -> Tensor:
    """Return the outputs [N, T, D] of sequences of unequal length, zero past their ends; longest first if `ordered`."""
    short = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=ordered)
    return pad_packed_sequence(module(short)[0], batch_first=True, total_length=x.shape[1])[0]


def token_loss(y: Tensor, t: Tensor, mean: bool) -> Tensor:
    """Return the cross-entropy [N] of logits [N, T, C], summed or averaged over a sample's tokens that are not −100."""
    losses = F.cross_entropy(y.transpose(1, 2), t, ignore_index=-100, reduction="none").sum(1)
    return losses / (t != -100).sum(1).clamp(min=1) if mean else losses


def gaps() -> Tensor:
    """Return labels [N, T] of which a sample keeps 3, 2, 1 and the last none."""
    return tokens(7, N, T).where(torch.arange(T) < torch.arange(N - 1, -1, -1)[:, None], -100)
