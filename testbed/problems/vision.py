"""Networks for small images that publications measure and no library holds; all return logits.

Dropout is left out: with it a problem has other gradients at every call, and it costs every backend the same.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from testbed.problems.base import Positive, ProblemError, Samples, register_model
from testbed.problems.forms import images

GROUPS = 16  # De et al. 2022: as many for every GroupNorm


class PositionMean(nn.Module):
    """Global average pooling, [N, C, H, W] → [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean over positions."""
        return x.mean((2, 3))


@register_model("cifar_cnn")
def cifar_cnn(example: Samples, *, width: Positive = 32) -> nn.Module:
    """The small CNN of the differential-privacy literature for CIFAR-10: eight 3×3 convolutions, no linear layer.

    As in Papernot et al. 2020, arXiv:2007.14191, and Subramani et al. 2020, arXiv:2010.09063, with its ReLUs.

    Options:
        width: Channels of the first convolution; the others have multiples of it.
    """
    found = images("cifar_cnn", example, least=8)
    channels = [found.shape[1], width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width]
    layers: list[nn.Module] = []
    for i in range(7):
        layers += [nn.Conv2d(channels[i], channels[i + 1], 3, padding=1), nn.ReLU()]
        if i in (1, 3, 5):
            layers.append(nn.AvgPool2d(2))
    return nn.Sequential(*layers, nn.Conv2d(channels[-1], example.outputs, 3, padding=1), PositionMean())


@register_model("cifar10_3c3d")
def three_convolutions_three_dense(example: Samples) -> nn.Module:
    """DeepOBS' 3C3D for 3×32×32 images, BackPACK's example: three convolutions with max pooling, three linear layers.

    Schneider et al. 2019, arXiv:1903.05499; with 3 channels and 10 classes it has 895 210 parameters.
    """
    found = images("cifar10_3c3d", example, least=32)
    if found.shape[2:] != (32, 32):
        raise ProblemError(
            f"model 'cifar10_3c3d' takes images of 32×32 pixels, the data has {found.shape[2]}×{found.shape[3]}"
        )
    layers: list[nn.Module] = []
    for before, after, size, padding in ((found.shape[1], 64, 5, 0), (64, 96, 3, 0), (96, 128, 3, 1)):
        convolution = nn.Conv2d(before, after, size, padding=padding)
        layers += [convolution, nn.ReLU(), nn.MaxPool2d(3, stride=2, ceil_mode=True)]  # TensorFlow's "same" pooling
    for before, after in ((9 * 128, 512), (512, 256)):
        layers += [nn.Flatten(), nn.Linear(before, after), nn.ReLU()]
    return _xavier(nn.Sequential(*layers, nn.Linear(256, example.outputs)), bias=0.0)


@register_model("all_cnn_c")
def all_cnn_c(example: Samples, *, width: Positive = 96) -> nn.Module:
    """All-CNN-C, BackPACK's example for CIFAR-100: nine convolutions, no linear layer.

    Springenberg et al. 2015, arXiv:1412.6806; with 3 channels and 100 classes it has 1 387 108 parameters.

    Options:
        width: Channels of the first three convolutions; most others have twice as many.
    """
    before = images("all_cnn_c", example, least=12).shape[1]
    layers: list[nn.Module] = []
    for after, size, stride, padding in (
        *((width, 3, 1, 1), (width, 3, 1, 1), (width, 3, 2, 1)),
        *((2 * width, 3, 1, 1), (2 * width, 3, 1, 1), (2 * width, 3, 2, 1)),
        *((2 * width, 3, 1, 0), (2 * width, 1, 1, 0), (example.outputs, 1, 1, 0)),
    ):
        layers += [nn.Conv2d(before, after, size, stride, padding), nn.ReLU()]
        before = after
    return _xavier(nn.Sequential(*layers, PositionMean()), bias=0.1)


def _xavier(model: nn.Module, bias: float) -> nn.Module:
    """Draw the weights as DeepOBS does: those of PyTorch leave networks without normalisation with tiny gradients."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.xavier_normal_(layer.weight)
            nn.init.constant_(layer.bias, bias)
    return model


class PreActivation(nn.Module):
    """A residual block of wide networks: GroupNorm, ReLU and a 3×3 convolution, twice, added to the input."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, before), nn.GroupNorm(GROUPS, after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if (before, stride) != (after, 1) else None

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, after, H / stride, W / stride] of [N, before, H, W]."""
        active = F.relu(self.norm1(x))
        added: Tensor = x if self.shortcut is None else self.shortcut(active)
        found: Tensor = added + self.conv2(F.relu(self.norm2(self.conv1(active))))
        return found


@register_model("wide_resnet")
def wide_resnet(example: Samples, *, depth: Positive = 16, factor: Positive = 4) -> nn.Module:
    """A Wide-ResNet with GroupNorm, WRN-16-4 by default, for images of 32×32.

    Zagoruyko and Komodakis 2016, arXiv:1605.07146, with the GroupNorm of De et al. 2022, arXiv:2204.13650; without
    their weight standardisation.

    Options:
        depth: Layers with weights: 4 + 6 · (blocks in each of three stages).
        factor: How many times as wide as a ResNet; its stages have 16, 32 and 64 channels.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ProblemError(f"model 'wide_resnet' takes depth=4 + 6 · blocks, such as 10, 16 or 28; found {depth}")
    channels = images("wide_resnet", example, least=4).shape[1]
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)]
    before = 16
    for stage, after in enumerate((16 * factor, 32 * factor, 64 * factor)):
        for block in range((depth - 4) // 6):
            layers.append(PreActivation(before, after, 2 if stage and not block else 1))
            before = after
    head = [nn.GroupNorm(GROUPS, before), nn.ReLU(), PositionMean(), nn.Linear(before, example.outputs)]
    return nn.Sequential(*layers, *head)
