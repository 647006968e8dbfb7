"""torchvision's architectures with random weights; all return logits.

Two things differ from what torchvision builds: no dropout, and nothing in place, which is an error under the module
hooks of some libraries.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from testbed.problems.base import Positive, ProblemError, Samples, register_model
from testbed.problems.forms import images

GROUPS = 32  # what Wu and He 2018, arXiv:1803.08494, take


@register_model("resnet18")
def resnet18(example: Samples) -> nn.Module:
    """ResNet-18 with GroupNorm for small images: a 3×3 first convolution and no first pooling.

    He et al. 2016, arXiv:1512.03385. BatchNorm would couple the samples.
    """
    from torchvision.models import ResNet  # slow to import
    from torchvision.models.resnet import BasicBlock

    class Block(BasicBlock):  # type: ignore[misc]  # torchvision has no types
        def forward(self, x: Tensor) -> Tensor:
            """Return what torchvision's block returns; that one adds in place."""
            added = x if self.downsample is None else self.downsample(x)
            inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            found: Tensor = self.relu(added + inner)
            return found

    channels = images("resnet18", example, least=8).shape[1]
    model = ResNet(Block, [2, 2, 2, 2], num_classes=example.outputs, norm_layer=partial(nn.GroupNorm, GROUPS))
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return _not_in_place(model)


@register_model("alexnet")
def alexnet(example: Samples, *, hidden: Positive = 4096) -> nn.Module:
    """AlexNet as torchvision has it, for large images of 3 channels.

    Krizhevsky 2014, arXiv:1404.5997.

    Options:
        hidden: Width of the two hidden linear layers.
    """
    from torchvision.models import alexnet as build  # slow to import

    return _classifier("alexnet", build, example, hidden, least=63)


@register_model("vgg16")
def vgg16(example: Samples, *, hidden: Positive = 4096) -> nn.Module:
    """VGG-16 as torchvision has it, for large images of 3 channels.

    Simonyan and Zisserman 2015, arXiv:1409.1556.

    Options:
        hidden: Width of the two hidden linear layers.
    """
    from torchvision.models import vgg16 as build  # slow to import

    return _classifier("vgg16", build, example, hidden, least=32)


@register_model("vit")
def vit(
    example: Samples,
    *,
    patch: Positive = 16,
    width: Positive = 768,
    depth: Positive = 12,
    heads: Positive = 12,
) -> nn.Module:
    """A vision transformer as torchvision has it, ViT-B/16 by default, for square images of 3 channels.

    Dosovitskiy et al. 2021, arXiv:2010.11929.

    Options:
        patch: Pixels a side of a patch.
        width: Numbers a patch; the MLPs are four times as wide.
        depth: Blocks.
        heads: Attention heads.
    """
    from torchvision.models import VisionTransformer  # slow to import

    _, channels, height, side = images("vit", example, least=patch).shape
    if channels != 3 or height != side or side % patch:
        raise ProblemError(
            f"model 'vit' takes square images of 3 channels whose sides are a multiple of patch={patch}, "
            f"the data has {channels}×{height}×{side}"
        )
    model: nn.Module = VisionTransformer(side, patch, depth, heads, width, 4 * width, num_classes=example.outputs)
    head = model.get_parameter("heads.head.weight")
    nn.init.trunc_normal_(head, std=0.02)  # torchvision's is zero, and with it all gradients but the head's
    return model


def _classifier(name: str, build: Callable[..., nn.Module], example: Samples, hidden: int, *, least: int) -> nn.Module:
    """Return a network of convolutions and three linear layers, weights as He et al. 2015, arXiv:1502.01852, draw them.

    It is built without memory first: of a narrow one, the wide layers are never made.
    """
    if (channels := images(name, example, least=least).shape[1]) != 3:
        raise ProblemError(f"model '{name}' takes images of 3 channels, the data has {channels}")
    with torch.device("meta"):
        model = build(num_classes=example.outputs, dropout=0.0)
        layers = model.get_submodule("classifier")
        assert isinstance(layers, nn.Sequential)
        linear = {i: layer for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)}
        widths = [next(iter(linear.values())).in_features, hidden, hidden, example.outputs]
        for i, (before, after) in zip(linear, pairwise(widths), strict=True):
            layers[i] = nn.Linear(before, after)
    model = model.to_empty(device="cpu")
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return _not_in_place(model)


def _not_in_place(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model
