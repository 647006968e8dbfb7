"""Whole-model cases by what surrounds the layers: modes, buffers, losses, inputs, batches, architectures."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import Linear
from torch.utils.checkpoint import checkpoint

from testbed.conformance.case import Case, D, K, N, T, real, squared_error
from testbed.conformance.parts import (
    Parts,
    again,
    attention,
    entropy,
    flat,
    gaps,
    gradient_times,
    headed,
    image,
    in_order,
    labels,
    packed,
    put_zero,
    raw,
    routed,
    row,
    sequence,
    shuffled,
    slope,
    square,
    token_loss,
    two,
    under_autocast,
    words,
)


# A row is two lines; formatted, the tables would be three times as long.
# fmt: off
def modes() -> list[Case]:
    """Return the cases of this kind."""
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
        row("mode: a gradient in the forward", "the forward differentiates by the input, and keeps the number alone",
            lambda m, x: m.out(m.a(x) * slope(m.a, x, differentiable=False))),
        row("mode: a gradient doubled on its way", "autograd runs a tensor's hook, others may not",
            lambda m, x: m.out(gradient_times(2, m.a(x)).sin())),
        row("mode: a straight-through estimator", "the gradient is not that of what the forward computes",
            lambda m, x: m.out((y := m.a(x)) + (y.sign() - y).detach())),
        row("buffer: a step counter", "changes with each forward",
            lambda m, x: m.out(m.a(x) * m.n.add_(1).clamp(max=1)), lambda: two(n=torch.zeros(()))),
        row("buffer: a running mean, not used", "takes in all samples", lambda m, x: (
            m.mean.lerp_(x.detach().mean(0), 0.1), m.out(m.a(x)))[1], lambda: two(mean=torch.zeros(D))),
        row("buffer: a constant", "an operand that is no parameter", lambda m, x: m.out(m.a(x) * m.s),
            lambda: two(s=real(D))),
    ]


def losses() -> list[Case]:
    """Return the cases of this kind."""
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


def inputs() -> list[Case]:
    """Return the cases of this kind."""
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
        row("input: channels last, permuted in the model", "strides out of order",
            lambda m, x: m.out(m.c(x.permute(0, 3, 1, 2)).sin().mean((2, 3))),
            lambda: headed(c=nn.Conv2d(2, D, 3)), partial(real, N, 8, 7, 2)),
        row("input: channels_last", "strides out of order", lambda m, x: m.out(m.c(x).sin().mean((2, 3))),
            lambda: headed(c=nn.Conv2d(2, D, 3)), lambda: image().to(memory_format=torch.channels_last)),
        row("batch: samples sorted in the model", "the layer's i-th row is not the i-th sample",
            lambda m, x: m.out(in_order(m.a, x).sin())),
        row("batch: samples shuffled at random in the model", "another order at each call (momentum contrast)",
            lambda m, x: m.out(shuffled(m.a, x).sin())),
        row("batch: divided by its size", "a sample's loss depends on how many there are",
            lambda m, x: m.out(m.a(x).sin()) / len(x)),
        row("batch: samples routed to experts", "a layer sees some of the samples",
            lambda m, x: m.out(routed(x, m.a, m.b)), lambda: two(b=Linear(D, D))),
        row("batch: samples repeated", "the layer's batch is 2N, interleaved",
            lambda m, x: m.out(m.a(x.repeat_interleave(2, 0)).sin().unflatten(0, (-1, 2)).sum(1))),
        row("batch: packed sequences", "the layer's batch is sorted by length, and shrinks",
            lambda m, x, lengths: m.out(packed(m.g, x, lengths).sum(1)),
            lambda: headed(g=nn.GRU(D, D, batch_first=True)), lambda: (sequence(), torch.arange(1, N + 1))),
        row("batch: packed sequences, in order", "the layer's batch shrinks",
            lambda m, x, lengths: m.out(packed(m.g, x, lengths, ordered=True).sum(1)),
            lambda: headed(g=nn.GRU(D, D, batch_first=True)), lambda: (sequence(), torch.arange(N + 1, 1, -1))),
    ]


def architectures() -> list[Case]:
    """Return the cases of this kind."""
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
GROUPS = (modes, losses, inputs, architectures)
