"""Models by name, each made to fit an example batch of the data."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testbed.problems.base import ProblemError, Samples, register_model


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
    shape = tuple(_tensor("simple_cnn", example).shape[1:])
    if shape != (1, 28, 28) or example.outputs != 10:
        found = f"{'×'.join(map(str, shape))} with {example.outputs}"
        raise ProblemError(f"model 'simple_cnn' takes 1×28×28 inputs with 10 outputs, the data has {found}")
    return SimpleCNN()


@register_model("mlp")
def mlp(example: Samples, *, hidden: tuple[int, ...] = (128, 128)) -> nn.Module:
    """Linear layers with ReLU between them, log-softmax at the end; any input shape."""
    widths = [_tensor("mlp", example)[0].numel(), *hidden]
    layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], example.outputs), nn.LogSoftmax(dim=1))


@register_model("logistic")
def logistic(example: Samples) -> nn.Module:
    """Logistic regression: one linear layer and log-softmax; any input shape."""
    return mlp(example, hidden=())


def _tensor(model: str, example: Samples) -> Tensor:
    if not isinstance(example.inputs, Tensor) or not example.inputs.is_floating_point():
        raise ProblemError(f"model '{model}' takes one floating-point tensor as input, the data has another form")
    return example.inputs
