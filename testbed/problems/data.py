"""Data by name: each draws n samples with torch's global generator, which the caller has seeded."""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.base import first_line
from testbed.problems.base import Positive, ProblemError, Samples, register_data


def cache_dir() -> Path:
    """Return where downloads are kept: `$TESTBED_CACHE`, or `~/.cache/per-sample-gradient-testbed`."""
    return Path(os.environ.get("TESTBED_CACHE") or Path.home() / ".cache" / "per-sample-gradient-testbed")


@register_data("random")
def random(n: int, *, shape: tuple[Positive, ...] = (1, 28, 28), classes: Positive = 10) -> Samples:
    """Normal inputs of any shape with uniform classes, as in the tutorial.

    Options:
        shape: Of a sample.
        classes: How many classes there are.
    """
    return Samples(torch.randn(n, *shape), torch.randint(classes, (n,)), classes)


@register_data("tokens")
def tokens(n: int, *, length: Positive = 16, vocabulary: Positive = 100, classes: Positive = 10) -> Samples:
    """Uniform token sequences of one length with uniform classes.

    Options:
        length: Tokens a sample.
        vocabulary: How many tokens there are.
        classes: How many classes there are.
    """
    return Samples(torch.randint(vocabulary, (n, length)), torch.randint(classes, (n,)), classes)


@register_data("digits")
def digits(n: int) -> Samples:
    """Handwritten digits (scikit-learn's 1797, offline), resized from 8×8 to 1×28×28, pixels in [0, 1]."""
    return _draw("digits", n, *_digits(), 10)


@register_data("mnist")
def mnist(n: int) -> Samples:
    """MNIST's test images, 1×28×28, pixels in [0, 1]; downloaded on first use."""
    return _draw("mnist", n, *_torchvision("mnist", "MNIST"), 10)


@register_data("fashion_mnist")
def fashion_mnist(n: int) -> Samples:
    """Fashion-MNIST's test images, 1×28×28, pixels in [0, 1]; downloaded on first use."""
    return _draw("fashion_mnist", n, *_torchvision("fashion_mnist", "FashionMNIST"), 10)


@register_data("cifar10")
def cifar10(n: int) -> Samples:
    """CIFAR-10's test images, 3×32×32, pixels in [0, 1]; downloaded on first use."""
    return _draw("cifar10", n, *_torchvision("cifar10", "CIFAR10"), 10)


def _draw(name: str, n: int, images: Tensor, labels: Tensor, classes: int) -> Samples:
    if n > len(images):
        raise ProblemError(f"data '{name}' has {len(images)} samples, the batch size is {n}; use at most that many")
    index = torch.randperm(len(images))[:n]
    return Samples(images[index], labels[index], classes)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # takes a second to import, and only this needs it

    found: Any = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    return torch.nn.functional.interpolate(images, size=(28, 28), mode="bilinear"), torch.tensor(found.target)


@cache
def _torchvision(name: str, dataset: str) -> tuple[Tensor, Tensor]:
    from torchvision import datasets  # slow to import, and only downloads need it

    root = cache_dir()
    try:
        found = getattr(datasets, dataset)(root, train=False, download=True)
    except (OSError, RuntimeError) as error:
        reason = first_line(error).rstrip(":")
        raise ProblemError(
            f"data '{name}' is not in {root} and could not be downloaded ({reason}); "
            "offline, use data 'digits' or 'random', or set TESTBED_CACHE to a folder that holds it"
        ) from None
    images = torch.as_tensor(found.data, dtype=torch.float32) / 255
    images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous(), torch.as_tensor(found.targets)
