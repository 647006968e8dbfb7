"""Models by name, each made to fit an example batch of the data."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testbed.problems.base import Positive, ProblemError, Samples, register_model
from testbed.problems.forms import floats, tokens


class SimpleCNN(nn.Module):
    """The network of PyTorch's per-sample-gradient tutorial, to the letter: 1×28×28 images, 10 log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities [N, 10] of images [N, 1, 28, 28]."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(x, 2)
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        return F.log_softmax(self.fc2(x), dim=1)


@register_model("simple_cnn")
def simple_cnn(example: Samples) -> nn.Module:
    """The tutorial's CNN (1×28×28 images, 10 classes)."""
    shape = tuple(floats("simple_cnn", example).shape[1:])
    if shape != (1, 28, 28) or example.outputs != 10:
        found = f"{'×'.join(map(str, shape))} with {example.outputs}"
        raise ProblemError(f"model 'simple_cnn' takes 1×28×28 inputs with 10 outputs, the data has {found}")
    return SimpleCNN()


@register_model("mlp")
def mlp(example: Samples, *, hidden: tuple[Positive, ...] = (128, 128)) -> nn.Module:
    """Linear layers with ReLU between them, log-softmax at the end; any input shape.

    Options:
        hidden: Widths of the hidden layers.
    """
    return _layers(floats("mlp", example), hidden, example.outputs)


@register_model("logistic")
def logistic(example: Samples) -> nn.Module:
    """Logistic regression: one linear layer and log-softmax; any input shape."""
    return _layers(floats("logistic", example), (), example.outputs)


def _layers(example: Tensor, hidden: tuple[int, ...], outputs: int) -> nn.Module:
    widths = [example[0].numel(), *hidden]
    layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], outputs), nn.LogSoftmax(dim=1))


@register_model("group_norm_cnn")
def group_norm_cnn(example: Samples, *, width: Positive = 16) -> nn.Module:
    """Two convolutions with GroupNorm and ReLU, mean pooling, a linear layer, log-softmax; any image size.

    Options:
        width: Channels of the first convolution, a multiple of 4; the second has twice as many.
    """
    channels = floats("group_norm_cnn", example).shape[1]
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.GroupNorm(4, width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.GroupNorm(4, 2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, example.outputs),
        nn.LogSoftmax(dim=1),
    )


class Transformer(nn.Module):
    """A small pre-norm transformer classifier: embedding, blocks, mean over positions, log-softmax."""

    def __init__(self, vocabulary: int, length: int, outputs: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        angles = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], 1))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return log-probabilities [N, outputs] of tokens [N, length]."""
        x = self.embedding(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return F.log_softmax(self.head(self.norm(x).mean(1)), dim=1)


class Block(nn.Module):
    """Self-attention and an MLP, each after LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, length, width] of the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return mixed


@register_model("transformer")
def transformer(
    example: Samples, *, vocabulary: Positive = 100, width: Positive = 32, heads: Positive = 4, depth: Positive = 2
) -> nn.Module:
    """A small transformer classifier of token sequences (data `tokens`).

    Options:
        vocabulary: How many tokens there are.
        width: Numbers a token, a multiple of `heads` and of 2.
        heads: Attention heads.
        depth: Blocks.
    """
    length = tokens("transformer", example, vocabulary).shape[1]
    if width % heads or width % 2:
        raise ProblemError(f"model 'transformer': width should be a multiple of heads={heads} and of 2, found {width}")
    return Transformer(vocabulary, length, example.outputs, width, heads, depth)
