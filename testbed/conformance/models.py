"""Whole-model cases: what people write around the layers, each with the reason why a library might get it wrong."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Linear
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
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


def slope(module: Forward, x: Tensor) -> Tensor:
    """Return the gradient [N, D] of each sample's output by its input, itself differentiable."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(module(x).square().sum(), x, create_graph=True)[0]


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


def routed(x: Tensor, *experts: Forward) -> Tensor:
    """Return for each sample the output of the one expert that its first feature picks."""
    y = torch.zeros_like(x)
    for i, expert in enumerate(experts):
        mine = (x[:, 0] > 0) == bool(i)
        y = y.index_put((mine,), expert(x[mine]))
    return y


def packed(module: nn.RNNBase, x: Tensor, lengths: Tensor) -> Tensor:
    """Return the outputs [N, T, D] of sequences of unequal length, zero past their ends."""
    short = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(module(short)[0], batch_first=True, total_length=x.shape[1])[0]


def token_loss(y: Tensor, t: Tensor, mean: bool) -> Tensor:
    """Return the cross-entropy [N] of logits [N, T, C], summed or averaged over a sample's tokens that are not −100."""
    losses = F.cross_entropy(y.transpose(1, 2), t, ignore_index=-100, reduction="none").sum(1)
    return losses / (t != -100).sum(1).clamp(min=1) if mean else losses


def gaps() -> Tensor:
    """Return labels [N, T] of which a sample keeps 3, 2, 1 and the last none."""
    return tokens(7, N, T).where(torch.arange(T) < torch.arange(N - 1, -1, -1)[:, None], -100)


# A row is two lines; formatted, the tables would be three times as long.
# fmt: off
def _tied() -> list[Case]:
    return [
        row("tied: a module called twice", "two calls, one parameter", lambda m, x: m.out(m.a(m.a(x).relu()))),
        row("tied: a module called in a loop", "many calls", lambda m, x: m.out(m.a(m.a(m.a(x).sin()).sin()))),
        row("tied: a module under two names", "named_parameters has it once", lambda m, x: m.out(m.b(m.a(x).sin())),
            lambda: two(a=(a := Linear(D, D)), b=a)),
        row("tied: one weight in two modules", "two modules, one parameter", lambda m, x: m.out(m.b(m.a(x).sin())),
            lambda: two(a=(a := Linear(D, D)), b=sharing(Linear(D, D), a))),
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


def _functional() -> list[Case]:
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


def _raw() -> list[Case]:
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


def _frozen() -> list[Case]:
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


def _reparametrised() -> list[Case]:
    computed: dict[str, Callable[[nn.Module], nn.Module]] = {
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm, in eval": parametrizations.spectral_norm,
        "orthogonal": parametrizations.orthogonal,
        "softplus": lambda a: parametrize.register_parametrization(a, "weight", nn.Softplus()),
        "old weight_norm": old_weight_norm,
        "old weight_norm, copyable": lambda a: plain(old_weight_norm(a)),
        "old spectral_norm, in eval": spectral_norm,
        "pruned": lambda a: plain(prune.l1_unstructured(a, "weight", 0.4)),  # type: ignore[no-untyped-call]
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
        row("module: returns a tuple", "the second output has a gradient too", lambda m, x: m.out(torch.mul(*m.a(x))),
            lambda: two(a=Net(lambda m, x: (m.a(x), x * m.s), a=Linear(D, D), s=raw(D)))),
        row("module: takes a list", "no input is a tensor", lambda m, x: m.out(m.a([x, x.sin()])),
            lambda: two(a=Net(lambda m, xs: m.a(xs[0]) * xs[1] * m.s, a=Linear(D, D), s=raw(D)))),
        row("module: a custom autograd.Function", "has no rule under vmap", lambda m, x: m.out(Cube.apply(m.a(x), m.s)),
            lambda: two(s=raw(D))),
    ]


def _modes() -> list[Case]:
    def then(module: nn.Module) -> Parts:
        return two(a=nn.Sequential(Linear(D, D), module))

    return [
        row("mode: checkpoint", "pytorch#165880; the forward runs twice", lambda m, x: m.out(again(m.a, x).sin())),
        row("mode: checkpoint, use_reentrant=True", "torch.autograd.grad refuses it, backward() does not",
            lambda m, x: m.out(checkpoint(m.b, m.a(x).sin(), use_reentrant=True)), lambda: two(b=Linear(D, D))),
        row("mode: Dropout in eval", "opacus captures nothing in eval", parts=lambda: then(nn.Dropout()),
            training=False),
        row("mode: Dropout in training", "no gradient repeats itself", parts=lambda: then(nn.Dropout())),
        row("mode: BatchNorm in eval", "has buffers, mixes no samples", parts=lambda: then(nn.BatchNorm1d(D)),
            training=False),
        row("mode: one layer in eval", "opacus captures nothing of it", lambda m, x: m.out(m.a.eval()(x).sin())),
        row("mode: autocast", "a context in the forward; it leaves float64 alone",
            lambda m, x: m.out(under_autocast(m.a, x).sin())),
        row("mode: ReLU(inplace=True)", "opacus#828", parts=lambda: then(nn.ReLU(inplace=True))),
        row("mode: F.relu_", "overwrites what a hook returned", lambda m, x: m.out(F.relu_(m.a(x)))),
        row("mode: residual in place", "overwrites what a hook returned", lambda m, x: m.out(m.a(x).add_(x))),
        row("mode: assigned in place", "overwrites what a hook returned", lambda m, x: m.out(put_zero(m.a(x)))),
        row("mode: a double backward", "the forward differentiates by the input", lambda m, x: m.out(slope(m.a, x))),
        row("buffer: a step counter", "changes with each forward",
            lambda m, x: m.out(m.a(x) * m.n.add_(1).clamp(max=1)), lambda: two(n=torch.zeros(()))),
        row("buffer: a running mean, not used", "takes in all samples", lambda m, x: (
            m.mean.lerp_(x.detach().mean(0), 0.1), m.out(m.a(x)))[1], lambda: two(mean=torch.zeros(D))),
        row("buffer: a constant", "an operand that is no parameter", lambda m, x: m.out(m.a(x) * m.s),
            lambda: two(s=real(D))),
    ]


def _losses() -> list[Case]:
    def tagger() -> Parts:
        return {"a": nn.Sequential(nn.Embedding(7, D), Linear(D, D)), "out": Linear(D, 7)}

    return [
        row("loss: mean over own tokens", "opacus#792: ignored targets; one sample has no other", parts=tagger,
            inputs=words, targets=gaps, loss=partial(token_loss, mean=True)),
        row("loss: sum over own tokens", "opacus#792: ignored targets; one sample has no other", parts=tagger,
            inputs=words, targets=gaps, loss=partial(token_loss, mean=False)),
        row("loss: class weights", "a mean would divide by the batch's weights", targets=labels,
            loss=lambda y, t: entropy(y, t, torch.arange(1, K + 1).to(y))),
        row("loss: label smoothing", "an option", targets=labels, loss=partial(entropy, label_smoothing=0.1)),
        row("loss: soft labels", "targets have a class axis", targets=lambda: real(N, K).softmax(1), loss=entropy),
        row("loss: weights in the targets", "each sample's loss has its own scale", targets=partial(real, N, K + 2),
            loss=lambda y, t: squared_error(y, t[:, :K]) * t[:, K].exp()),
        row("loss: weights in the inputs", "the scale comes through the model",
            lambda m, x, weight: m.out(m.a(x).sin()) * weight[:, None],
            inputs=lambda: {"x": real(N, D), "weight": torch.rand(N)}),
        row("loss: outputs [N]", "one number a sample", lambda m, x: m.out(m.a(x)).sum(1), targets=partial(real, N),
            loss=partial(F.huber_loss, reduction="none")),
    ]


def _inputs() -> list[Case]:
    return [
        row("input: a tuple", "model(*inputs)", lambda m, x, y: m.out(m.a(x) * y),
            inputs=lambda: (flat(), flat())),
        row("input: a dict", "model(**inputs)", lambda m, x, y: m.out(m.a(x) * y),
            inputs=lambda: {"y": flat(), "x": flat()}),
        row("input: with a mask", "not all inputs have gradients",
            lambda m, x, k: m.out((m.a(x) * k[..., None]).sum(1)), two, lambda: (sequence(), torch.rand(N, T) > 0.3)),
        row("input: N = 1", "every axis of 1 may be the batch", inputs=partial(real, 1, D),
            targets=partial(real, 1, K)),
        row("input: squeezed outputs", "squeeze() drops a batch of one", lambda m, x: m.out(m.a(x))[:, :1].squeeze(),
            targets=partial(real, N), loss=lambda y, t: (y - t).square()),
        row("input: not contiguous", "view fails", inputs=lambda: real(D, N).t()),
        row("input: expanded", "all samples in one memory", inputs=lambda: real(1, D).expand(N, D)),
        row("input: channels_last", "strides out of order", lambda m, x: m.out(m.c(x).sin().mean((2, 3))),
            lambda: headed(c=nn.Conv2d(2, D, 3)), lambda: image().to(memory_format=torch.channels_last)),
        row("batch: samples sorted in the model", "the layer's i-th row is not the i-th sample",
            lambda m, x: m.out(in_order(m.a, x).sin())),
        row("batch: samples routed to experts", "a layer sees some of the samples",
            lambda m, x: m.out(routed(x, m.a, m.b)), lambda: two(b=Linear(D, D))),
        row("batch: samples repeated", "the layer's batch is 2N, interleaved",
            lambda m, x: m.out(m.a(x.repeat_interleave(2, 0)).sin().unflatten(0, (-1, 2)).sum(1))),
        row("batch: packed sequences", "the layer's batch is sorted by length, and shrinks",
            lambda m, x, lengths: m.out(packed(m.g, x, lengths).sum(1)),
            lambda: headed(g=nn.GRU(D, D, batch_first=True)), lambda: (sequence(), torch.arange(1, N + 1))),
    ]


def _architectures() -> list[Case]:
    return [
        row("net: attention", "no module computes it", lambda m, x: m.out(attention(m.a(x)).mean(1)),
            lambda: two(a=Linear(D, 3 * D)), sequence),
        row("net: causal attention", "no module computes it", lambda m, x: m.out(attention(m.a(x), True).mean(1)),
            lambda: two(a=Linear(D, 3 * D)), sequence),
        row("net: relative positions", "a table indexed by constants, for all samples",
            lambda m, x: m.out(((x @ x.mT + m.t[torch.arange(T)[:, None] - torch.arange(T)]).softmax(2) @ x).sum(1)),
            lambda: headed(t=raw(2 * T)), sequence),
        row("net: tokens folded into the batch", "the layer's batch is N·T",
            lambda m, x: m.out(m.a(x.reshape(-1, D)).sin().view(-1, T, D).sum(1)), two, sequence),
        row("net: sequence-first inside, T = N", "the batch is on the second axis, no shape shows it",
            lambda m, x: m.out(m.n(m.a(x.transpose(0, 1))).sum(0)), lambda: two(n=nn.LayerNorm(D)), square),
        row("net: mean over time", "one gradient for all positions", lambda m, x: m.out(m.a(x).mean(1)), two, sequence),
        row("net: LayerNorm over three axes", "parameters of three axes", lambda m, x: m.out(m.a(x).flatten(1)),
            lambda: {"a": nn.LayerNorm([2, 8, 7]), "out": Linear(112, K)}, image),
        row("net: patches by unfold", "a layer on overlapping views",
            lambda m, x: m.out(m.a(F.unfold(x, 3, stride=2).mT).sin().sum(1)), lambda: two(a=Linear(18, D)), image),
        row("net: patches by convolution", "kernel = stride, with a rest",
            lambda m, x: m.out(m.a(x).flatten(2).mT.sin().sum(1)), lambda: two(a=nn.Conv2d(2, D, 3, 3)), image),
        row("net: dense concatenation", "an output with two consumers",
            lambda m, x: m.out(torch.cat([(y := m.a(x).sin()), m.b(torch.cat([x, y], 1))], 1)),
            lambda: two(b=Linear(2 * D, D), out=Linear(2 * D, K)), flat),
        row("net: depthwise separable convolution", "groups = channels, then a kernel of 1",
            lambda m, x: m.out(m.b(m.a(x)).sin().sum((2, 3))),
            lambda: two(a=nn.Conv2d(2, 2, 3, groups=2), b=nn.Conv2d(2, D, 1)), image),
        row("net: Sequential, ModuleList, ModuleDict", "names of four levels", lambda m, x: m.d["k"](m.l[1](m.l[0](x))),
            lambda: {"d": nn.ModuleDict({"k": Linear(D, K)}), "l": nn.ModuleList([
                nn.Sequential(Linear(D, D), nn.Sequential(nn.Tanh(), Linear(D, D))), nn.Tanh()])}),
    ]


# fmt: on
def model_cases() -> list[Case]:
    """Return the whole-model cases, none of them built."""
    groups = (_tied, _functional, _raw, _frozen, _reparametrised, _modes, _losses, _inputs, _architectures)
    return [one for group in groups for one in group()]
