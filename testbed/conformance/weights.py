"""Whole-model cases by what becomes of a weight: tied, used functionally, raw, frozen, unused, computed."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn import Linear
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from testbed.conformance.case import Case, D, K, N, Net, T, real
from testbed.conformance.parts import (
    Cube,
    Parts,
    Scaled,
    again,
    attention,
    doubled,
    flat,
    frozen,
    headed,
    hooked,
    image,
    old_weight_norm,
    plain,
    raw,
    row,
    sequence,
    sharing,
    square,
    token_loss,
    two,
    under_no_grad,
    words,
)


# A row is two lines; formatted, the tables would be three times as long.
# fmt: off
def tied() -> list[Case]:
    """Return the cases of this kind."""
    return [
        row("tied: a module called twice", "two calls, one parameter", lambda m, x: m.out(m.a(m.a(x).relu()))),
        row("tied: a module called in a loop", "many calls", lambda m, x: m.out(m.a(m.a(m.a(x).sin()).sin()))),
        row("tied: a module under two names", "named_parameters has it once", lambda m, x: m.out(m.b(m.a(x).sin())),
            lambda: two(a=(a := Linear(D, D)), b=a)),
        row("tied: one weight in two modules", "two modules, one parameter", lambda m, x: m.out(m.b(m.a(x).sin())),
            lambda: two(a=(a := Linear(D, D)), b=sharing(Linear(D, D), a))),
        row("tied: a module under two parents", "a walk meets it twice", lambda m, x: m.out(m.y(m.x(x).sin())),
            lambda: headed(x=Net(lambda m, x: m.a(x), a=(a := Linear(D, D))), y=Net(lambda m, x: m.a(x), a=a))),
        row("tied: embedding and output head", "an index and a matmul", lambda m, x: m.out(m.a(x).cumsum(1).sin()),
            lambda: {"a": (e := nn.Embedding(7, D)), "out": sharing(Linear(D, 7), e)}, words, words,
            partial(token_loss, mean=True)),
        row("tied: convolution and its transpose", "an autoencoder's weight, the second time functionally",
            lambda m, x: m.out(F.conv_transpose1d(m.c(x).sin(), m.c.weight).mean(2)),
            lambda: headed(c=nn.Conv1d(D, 8, 3)), partial(real, N, D, 7)),
        row("tied: one call detached", "one of two calls has no backward",
            lambda m, x: m.out(m.a(x) * m.a(x + 1).detach())),
        row("tied: called again under no_grad", "a hook then keeps the wrong input (target networks)",
            lambda m, x: m.out(m.a(x) * under_no_grad(m.a, x + 1))),
        row("tied: a call whose output is dropped", "a stack of activations is one off",
            lambda m, x: m.out((m.a(x), m.a(x + 1))[0])),
        row("tied: called on halves of the batch", "each call's first row is taken for sample 0",
            lambda m, x: m.out(torch.cat([m.a(x[: len(x) // 2]), m.a(x[len(x) // 2 :])]))),
        row("tied: called on 2-D and 3-D inputs", "two shapes of activations, one parameter",
            lambda m, x: m.out(m.a(x.mean(1)) + m.a(x).sin().mean(1)), two, sequence),
        row("tied: called twice, checkpointed", "hooks fire again in the recomputation",
            lambda m, x: m.out(again(m.a, again(m.a, x).sin()))),
    ]


def functional() -> list[Case]:
    """Return the cases of this kind."""
    return [
        row("functional: F.linear after the module", "no hook sees the second use",
            lambda m, x: m.out(F.linear(m.a(x).sin(), m.a.weight))),
        row("functional: F.linear without the module", "no hook sees any use",
            lambda m, x: m.out(F.linear(x, m.a.weight, m.a.bias))),
        row("functional: x @ weight.t()", "a view is used", lambda m, x: m.out(m.a(x).sin() @ m.a.weight.t())),
        row("functional: half a weight", "a part is used once more",
            lambda m, x: m.out(m.a(x) * F.linear(x, m.a.weight.chunk(2)[0]).repeat(1, 2))),
        row("functional: forward, not the module, is called", "no hook runs", lambda m, x: m.out(m.a.forward(x).sin())),
        row("functional: called by keyword", "hooks see no input", lambda m, x: m.out(m.a(input=x).sin())),
        row("functional: a penalty on the weight", "a use that sees no sample, in every sample's loss",
            lambda m, x: m.out(m.a(x)) + m.a.weight.square().mean()),
        row("functional: a normalised weight", "a cosine classifier: not linear in the weight",
            lambda m, x: F.linear(F.normalize(m.a(x)), F.normalize(m.out.weight), m.out.bias)),
        row("functional: functional_call with other weights", "the module runs, its own weights do not (teachers)",
            lambda m, x: m.out(m.a(x) * functional_call(m.a, {"weight": 2 * m.a.weight.detach()}, (x,)))),
        row("functional: functional_call with a parameter", "the module runs, its own weights do not",
            lambda m, x: m.out(functional_call(m.a, {"weight": m.w}, (x,))), lambda: two(w=raw(D, D))),
        row("functional: F.conv2d", "no module owns it", lambda m, x: m.out(F.conv2d(x, m.w, m.b).sin().mean((2, 3))),
            lambda: headed(w=raw(D, 2, 3, 3), b=raw(D)), image),
        row("functional: F.embedding", "no module owns it", lambda m, x: m.out(F.embedding(x, m.w).sin().sum(1)),
            lambda: headed(w=raw(7, D)), words),
        row("functional: a table by []", "an index, not an embedding", lambda m, x: m.out(m.w[x].sin().sum(1)),
            lambda: headed(w=raw(7, D)), words),
        row("functional: F.layer_norm", "no module owns it", lambda m, x: m.out(F.layer_norm(m.a(x), (D,), m.w, m.b)),
            lambda: two(w=raw(D), b=raw(D))),
        row("functional: einsum over experts", "one parameter holds several matrices",
            lambda m, x: m.out(torch.einsum("nd,edf,ne->nf", x, m.w, m.a(x)[:, :2].softmax(1))),
            lambda: two(w=raw(2, D, D))),
    ]


def raw_parameters() -> list[Case]:
    """Return the cases of this kind."""
    return [
        row("raw: a scale", "the root owns a parameter and has children (opacus#510)",
            lambda m, x: m.out(m.a(x) * m.s), lambda: two(s=raw(D))),
        row("raw: an additive bias", "no product to see", lambda m, x: m.out(m.a(x) + m.s), lambda: two(s=raw(D))),
        row("raw: a scalar", "its shape is []", lambda m, x: m.out(m.a(x) * m.s), lambda: two(s=raw())),
        row("raw: positions [T, D]", "broadcast over the batch", lambda m, x: m.out((m.a(x) + m.s).sin().mean(1)),
            lambda: two(s=raw(T, D)), sequence),
        row("raw: positions [T, D], T = N", "looks like a row a sample",
            lambda m, x: m.out((m.a(x) + m.s).sin().mean(1)), lambda: two(s=raw(N, D)), square),
        row("raw: positions [1, T, D]", "a batch axis of 1", lambda m, x: m.out((m.a(x) + m.s).sin().mean(1)),
            lambda: two(s=raw(1, T, D)), sequence),
        row("raw: class token", "expanded over the batch and concatenated",
            lambda m, x: m.out(m.a(torch.cat([m.s.expand(len(x), 1, D), x], 1)).sin().mean(1)),
            lambda: two(s=raw(1, 1, D)), sequence),
        row("raw: learned queries", "a layer is called on a parameter, which has no batch axis",
            lambda m, x: m.out(((m.a(m.s) @ x.mT).softmax(2) @ x).sum(1)), lambda: two(s=raw(2, D)), sequence),
        row("raw: learned initial state", "the batch is on its second axis",
            lambda m, x: m.out(m.g(x, m.s.expand(1, len(x), D).contiguous())[0].mean(1)),
            lambda: headed(g=nn.GRU(D, D, batch_first=True), s=raw(1, 1, D)), sequence),
        row("raw: in a submodule with children", "the children are handled twice (opacus#510)", parts=lambda: two(
            a=Net(lambda m, x: m.a(x).sin() @ m.s, a=Linear(D, D), s=raw(D, D)))),
        row("raw: ParameterList", "names with numbers", lambda m, x: m.out(m.a(x) * m.p[0] + m.p[1]),
            lambda: two(p=nn.ParameterList([raw(D), raw(D)]))),
        row("raw: ParameterDict", "names with keys", lambda m, x: m.out(m.a(x) * m.p["s"] + m.p["b"]),
            lambda: two(p=nn.ParameterDict({"s": raw(D), "b": raw(D)}))),
        row("raw: all of one shape", "a swap of names keeps the shapes",
            lambda m, x: attention(torch.cat([x @ m.q, x @ m.k, x @ m.v], 2)).mean(1),
            lambda: {"q": raw(D, D), "k": raw(D, D), "v": raw(D, D)}, sequence, flat),
        row("raw: the same names at three depths", "`a`, `x.a` and `x.x.a` are three parameters",
            lambda m, x: m.out(m.a(x) + m.x(x)), lambda: two(x=Net(
                lambda m, x: m.a(x) * m.x(x), a=Linear(D, D), x=Net(lambda m, x: m.a(x).sin(), a=Linear(D, D))))),
        row("raw: through a complex view", "complex numbers between real ones",
            lambda m, x: m.out(torch.fft.irfft(torch.fft.rfft(m.a(x)) * torch.view_as_complex(m.s), n=D)),
            lambda: two(s=raw(D // 2 + 1, 2))),
    ]


def frozen_parameters() -> list[Case]:
    """Return the cases of this kind."""
    def convnet(ending: str) -> Parts:
        net = nn.Sequential(nn.Conv1d(D, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * T, D), nn.LayerNorm(D))
        return two(a=frozen(net, ending))

    return [
        row("frozen: the first layer", "its input needs no gradient", parts=lambda: two(a=frozen(Linear(D, D)))),
        row("frozen: the last layer", "gradients flow through it", parts=lambda: two(out=frozen(Linear(D, K)))),
        row("frozen: all weights", "biases alone are trained (BitFit)", parts=partial(convnet, "weight"),
            inputs=partial(real, N, D, 7)),
        row("frozen: all biases", "weights alone are trained", parts=partial(convnet, "bias"),
            inputs=partial(real, N, D, 7)),
        row("frozen: under LoRA of raw parameters", "opacus#820", lambda m, x: m.out(m.a(x) + x @ m.down.T @ m.up.T),
            lambda: two(a=frozen(Linear(D, D)), down=raw(2, D), up=raw(D, 2))),
        row("frozen: under LoRA of Linears", "opacus#820", lambda m, x: m.out(m.a(x) + m.up(m.down(x))),
            lambda: two(a=frozen(Linear(D, D)), down=Linear(D, 2, bias=False), up=Linear(2, D, bias=False))),
        row("unused: a module", "to get zeros, not to be left out", lambda m, x: m.out(x)),
        row("unused: a raw parameter", "to get zeros, not to be left out", parts=lambda: two(s=raw(D))),
        row("unused: by a flag", "which of two is used is decided in the forward",
            lambda m, x: m.out(m.a(x) if m.training else m.b(x)), lambda: two(b=Linear(D, D))),
        row("unused: by some samples", "zeros in some rows", lambda m, x: m.out(m.a(x).where(x[:, :1] > 0, m.b(x))),
            lambda: two(b=Linear(D, D))),
        row("unused: under no_grad", "a forward without a backward", lambda m, x: m.out(under_no_grad(m.a, x))),
        row("unused: under detach", "a forward without a backward", lambda m, x: m.out(m.a(x).detach())),
    ]


def reparametrised() -> list[Case]:
    """Return the cases of this kind."""
    def scaling(a: nn.Module) -> Parts:
        return two(a=Net(lambda m, x, scale=None: m.a(x) * m.s * (1 if scale is None else scale), a=a, s=raw(D)))

    computed: dict[str, Callable[[nn.Module], nn.Module]] = {
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm, in eval": parametrizations.spectral_norm,
        "orthogonal": parametrizations.orthogonal,
        "softplus": lambda a: parametrize.register_parametrization(a, "weight", nn.Softplus()),
        "old weight_norm": old_weight_norm,
        "old weight_norm, copyable": lambda a: plain(old_weight_norm(a)),
        "old spectral_norm, in eval": spectral_norm,
        "pruned": lambda a: plain(prune.l1_unstructured(a, "weight", 0.4)),
    }
    return [
        *(row(f"weight: {name}", "the layer's weight is computed from other parameters",
              parts=partial(lambda compute: two(a=compute(Linear(D, D))), compute), training="eval" not in name)
          for name, compute in computed.items()),
        row("weight: a hypernetwork's output", "a matrix a sample, which is no parameter",
            lambda m, x: m.out((m.h(x).view(-1, D, D) @ x[:, :, None]).squeeze(2)), lambda: headed(h=Linear(D, D * D))),
        row("module: a subclass of Linear", "not what its type says", parts=lambda: two(a=Scaled(D, D))),
        row("module: a hook triples the output", "a gradient seen by hooks is not the layer's",
            parts=lambda: two(a=hooked(Linear(D, D), before=False))),
        row("module: a hook triples the input", "an input seen by hooks is not the layer's",
            parts=lambda: two(a=hooked(Linear(D, D), before=True))),
        row("module: a hook doubles the gradient", "autograd runs the hook, others may not",
            lambda m, x: m.out(m.b(m.a(x).sin())), lambda: two(b=doubled(Linear(D, D)))),
        row("module: an optional second tensor", "a rule that runs the module anew on one tensor is lacking the other",
            lambda m, x: m.out(m.a(x, x.sin())), lambda: scaling(Linear(D, D))),
        row("module: an optional tensor by keyword", "hooks see positional inputs only",
            lambda m, x: m.out(m.a(x, scale=x.sin())), lambda: scaling(Linear(D, D))),
        row("module: returns a tuple", "the second output has a gradient too", lambda m, x: m.out(torch.mul(*m.a(x))),
            lambda: two(a=Net(lambda m, x: (m.a(x), x * m.s), a=Linear(D, D), s=raw(D)))),
        row("module: takes a list", "no input is a tensor", lambda m, x: m.out(m.a([x, x.sin()])),
            lambda: two(a=Net(lambda m, xs: m.a(xs[0]) * xs[1] * m.s, a=Linear(D, D), s=raw(D)))),
        row("module: a custom autograd.Function", "has no rule under vmap", lambda m, x: m.out(Cube.apply(m.a(x), m.s)),
            lambda: two(s=raw(D))),
    ]


# fmt: on
GROUPS = (tied, functional, raw_parameters, frozen_parameters, reparametrised)
