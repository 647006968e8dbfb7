"""Small problems, each with the reason why a backend might get it wrong. Contract tests run every backend on each."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends.base import LossFn
from backends.batch import Batch, apply, cast
from testbed.problems.models import SimpleCNN

N = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """A model, a loss and a batch, in float64.

    Attributes:
        name: What the test's id shows.
        model: The model.
        loss_fn: (outputs, targets) -> losses [N].
        inputs: [N, ...].
        targets: [N, ...].
        may_refuse: Backends may refuse it; where False, refusing is a failure.
    """

    name: str
    model: nn.Module
    loss_fn: LossFn
    inputs: Batch
    targets: Tensor
    may_refuse: bool = True


def real(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return Σ (output − target)² of each sample [N]."""
    return (outputs.flatten(1) - targets[:, None]).square().sum(1)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each sample [N]."""
    return F.cross_entropy(outputs, targets, reduction="none")


class Functional(nn.Module):
    """A model whose forward is a function of itself and the inputs."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self._forward(self, *args, **kwargs)


def linear(inputs: int = 5, outputs: int = 4) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def mlp() -> nn.Module:
    return nn.Sequential(linear(), nn.Tanh(), linear(4, 2))


def frozen() -> nn.Module:
    """The first layer frozen, and the last bias."""
    model = mlp()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def tied() -> nn.Module:
    """Two layers share one weight, each with a bias of its own."""
    first, second = linear(5, 5), linear(5, 5)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def positions(length: int) -> nn.Module:
    """Token embeddings plus position embeddings that are broadcast over the batch."""
    return Functional(
        lambda s, t: s.out((s.tokens(t) + s.positions(torch.arange(t.shape[1], device=t.device))).tanh().mean(1)),
        tokens=nn.Embedding(7, 5),
        positions=nn.Embedding(length, 5),
        out=linear(),
    )


def cases() -> list[Case]:
    """Return all cases; the same ones at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        vectors, sequences, images = torch.randn(N, 5), torch.randn(N, 4, 5), torch.randn(N, 2, 6, 6)
        tokens, classes, values = torch.randint(7, (N, 4)), torch.randint(2, (N,)), torch.randn(N)
        # fmt: off
        made = [
            Case("tutorial", SimpleCNN(), lambda o, t: F.nll_loss(o, t, reduction="none"), torch.randn(N, 1, 28, 28),
                 torch.randint(10, (N,)), may_refuse=False),
            Case("mlp", mlp(), cross_entropy, vectors, classes, may_refuse=False),
            Case("mlp in eval mode", mlp().eval(), cross_entropy, vectors, classes, may_refuse=False),
            Case("one sample", mlp(), cross_entropy, vectors[:1], classes[:1], may_refuse=False),
            Case("frozen parameters", frozen(), cross_entropy, vectors, classes, may_refuse=False),
            Case("unused parameters", Functional(lambda s, x: s.a(x), a=linear(), b=linear()), squares, vectors, values,
                 may_refuse=False),
            Case("dead sample", nn.Sequential(linear(), nn.ReLU(), linear(4, 2)), lambda o, t: o.sum(1) * t, vectors,
                 torch.tensor([1.0, 0.0, -1.0]), may_refuse=False),
            Case("sequence into Linear", Functional(lambda s, x: s.a(x).tanh(), a=linear()), squares, sequences, values,
                 may_refuse=False),
            Case("grouped and dilated Conv2d", nn.Conv2d(2, 4, 3, groups=2, dilation=2), squares, images, values,
                 may_refuse=False),
            Case("tied parameter", tied(), squares, vectors, values),
            Case("module called twice", Functional(lambda s, x: s.a(s.a(x).tanh()), a=linear(5, 5)), squares, vectors,
                 values),
            Case("module called twice, once in vain",
                 Functional(lambda s, x: (s.a(x).tanh(), s.a(2 * x))[0], a=linear(5, 5)), squares, vectors, values),
            Case("weight reused through F.linear",
                 Functional(lambda s, x: F.linear(s.a(x).tanh(), s.a.weight), a=linear(5, 5)), squares, vectors, values),
            Case("raw parameter", Functional(lambda s, x: s.a(x) * s.scale, a=linear(),
                                             scale=nn.Parameter(torch.randn(4))), squares, vectors, values),
            Case("scalar parameter", Functional(lambda s, x: s.a(x) * s.scale, a=linear(), scale=nn.Parameter(torch.tensor(0.7))), squares, vectors, values),
            Case("Conv2d padding_mode='reflect'", nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), squares, images,
                 values),
            Case("Conv2d padding_mode='circular'", nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), squares,
                 images, values),
            Case("sequence first, as long as the batch",
                 Functional(lambda s, x: s.a(x.transpose(0, 1)).tanh().transpose(0, 1), a=linear()), squares,
                 sequences[:, :N], values),
            Case("batch and time folded together",
                 Functional(lambda s, x: s.a(x.reshape(-1, 5)).tanh().view(len(x), -1), a=linear()), squares, sequences,
                 values),
            Case("position embeddings", positions(4), squares, tokens, values),
            Case("position embeddings, as many as samples", positions(N), squares, tokens[:, :N], values),
            Case("in-place ReLU", nn.Sequential(linear(), nn.ReLU(inplace=True), linear(4, 2)), squares, vectors, values),
            Case("GroupNorm", nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()), squares, images, values),
            Case("LayerNorm over a sequence", nn.Sequential(nn.LayerNorm(5), linear()), squares, sequences, values),
            Case("BatchNorm in eval mode", nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).eval(), squares, images,
                 values),
            Case("PReLU", nn.Sequential(linear(), nn.PReLU()), squares, vectors, values),
            Case("LSTM", Functional(lambda s, x: s.a(x)[0], a=nn.LSTM(5, 4, batch_first=True)), squares, sequences,
                 values),
            Case("MultiheadAttention",
                 Functional(lambda s, x: s.a(x, x, x)[0], a=nn.MultiheadAttention(5, 1, batch_first=True)), squares,
                 sequences, values),
            Case("two inputs", Functional(lambda s, x, y: s.a(x) * s.b(y), a=linear(), b=linear()), squares,
                 (vectors, vectors.flip(1)), values),
            Case("named inputs", Functional(lambda s, left, right: s.a(left) * s.b(right), a=linear(), b=linear()),
                 squares, {"left": vectors, "right": vectors.flip(1)}, values),
            Case("tokens with ignored targets", nn.Sequential(nn.Embedding(7, 5), linear(5, 7)), _tokens, tokens,
                 torch.where(tokens > 4, -100, tokens.flip(1))),
            Case("buffer that counts calls", _Counting(), squares, vectors, values),
        ]
    # fmt: on
    return [_placed(case) for case in made]


def _tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over each sample's own tokens; −100 is ignored."""
    losses = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
    return losses.sum(1) / (targets != -100).sum(1).clamp_min(1)


class _Counting(nn.Module):
    """Counts its calls in a buffer and uses the count: every sample must see the same one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


def _placed(case: Case) -> Case:
    """Return the case in float64 on the device that tests run on."""
    return replace(
        case,
        model=case.model.to(DEVICE, torch.float64),
        inputs=apply(lambda t: t.to(DEVICE), cast(case.inputs, torch.float64)),
        targets=cast(case.targets, torch.float64).to(DEVICE),
    )
