"""Per-sample weight gradients of convolutions of one to three dimensions and their transposes: one bilinear form."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from backends import precision
from backends.derived import wide
from backends.ops.choice import Paths, Way, capturing, fastest
from backends.ops.conv_ways import by_patches, by_places, grouped, product_of
from backends.ops.gram import Window, exact, inner_products, pairs, products_of_patches, sums
from backends.ops.outer import Outer, in_doubt_too, shows
from backends.ops.persample import WIDER, Empty, PerSample, at_a_time, fresh, scaled

IMAGES = 8
"""Times as many bytes of images as of gradients may be at work at a time: ways copy both, but gradients go on."""


MANY = 128
"""Output pixels a sample from which on a kernel without patches may be faster."""


@dataclass
class Correlation(PerSample):
    """Gradients by w of ⟨y, conv(x, w)⟩: of a convolution for x = a, y = g, of a transposed one for x = g, y = a.

    The weighted sum over samples is the ordinary weight gradient. For gradients of each sample there are several ways,
    of which the fastest is chosen by measuring.

    Attributes:
        x: [N, B, C, *size], B images a sample.
        y: [N, B, P, *size].
        shape: Of w, [P, C / groups, *kernel].
        stride: In each dimension.
        padding: In each dimension.
        dilation: In each dimension.
        groups: Groups of channels.
    """

    x: Tensor
    y: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def __post_init__(self) -> None:
        self.samples, self.like = self.y.shape[0], self.y

    def rows(self, some: slice) -> Tensor:  # noqa: D102
        of = self.only(some)
        parts = at_a_time(of.samples, of.held() // (IMAGES * max(1, of.samples)), of.like)
        if len(parts) == 1:
            ways = {way.__name__: partial(way, of) for way in self.ways()}
            kernels = {"implicit_gemm": lambda: product_of(of).grads()} if self.positions() >= MANY else None
            return fastest(ways, self.geometry(), of.samples, of.like, kernels)
        rows = of.like.new_empty(of.samples, *of.shape)
        for part in parts:
            rows[part] = of.rows(part)
        return rows

    def only(self, some: slice) -> "Correlation":
        """Return those of some samples."""
        if len(range(self.samples)[some]) == self.samples:
            return self
        sizes = self.stride, self.padding, self.dilation
        return Correlation(self.x[some], self.y[some], self.shape, *sizes, self.groups)  # `replace` takes longer

    def positions(self) -> int:
        """Return how many output pixels a sample has."""
        return self.y.shape[1] * prod(self.y.shape[3:])

    def ways(self) -> list[Callable[["Correlation"], Tensor]]:
        """Return the ways to its gradients that there are."""
        found: list[Callable[[Correlation], Tensor]] = [grouped]
        if self.groups == 1:
            found += [by_patches, *([by_places] if set(self.stride) == {1} and self.x.shape[1] == 1 else [])]
        return found

    def geometry(self) -> str:  # noqa: D102
        return _geometry(self.x.shape[1:], self.shape, self.stride, self.padding, self.dilation)

    def held(self) -> int:  # noqa: D102
        return (self.x.numel() + self.y.numel()) * self.like.element_size()

    def squares(self) -> Tensor:
        """Return ‖g_i‖² [N]; of small images perhaps in the Gram form."""
        ways: dict[str, Way] = {"direct": super().squares}
        kernels: dict[str, Paths] = {}
        unchecked: dict[str, Paths] = {}
        if self.positions() >= MANY:
            kernels["implicit_gemm"] = lambda: product_of(self).squares()
        if self.groups == 1:
            direct, gram = self.positions() * prod(self.shape), self.multiplied()
            if gram < direct and self.like.dtype in WIDER and not capturing(self.like):
                ways["gram"] = self.squares_by_gram
            kernels["patches, fused"] = partial(self.squares_by_patches, Outer.squares_fused)
            if 0 < self.positions() * (self.shape[0] + prod(self.shape[1:])) < 2 * prod(self.shape):
                by_gram = in_doubt_too(Outer.squares_by_gram_fused)
                kernels["patches, gram, fused"] = tuple(partial(self.squares_by_patches, way) for way in by_gram)
            if gram < 2 * direct:
                unchecked["gram, fused"] = in_doubt_too(self.squares_by_gram_fused)
        return fastest(ways, f"norms of {self.geometry()}", self.samples, self.like, kernels, unchecked)

    def gram(self) -> Tensor:
        """Return ⟨g_i, g_j⟩ [N, N]; of small images perhaps without gradients."""
        ways: dict[str, Way] = {"direct": super().gram}
        direct = (2 * self.positions() + self.samples) * prod(self.shape)  # each pair once
        fewer = self.groups == 1 and self.samples * self.multiplied() < direct
        if fewer and self.like.dtype in WIDER and not capturing(self.like):
            ways["by pixels"] = self.gram_by_pixels
        return fastest(ways, f"inner products of {self.geometry()}", self.samples, self.like)

    def squares_by_patches(self, squares: Callable[[Outer], Tensor]) -> Tensor:
        """Return ‖g_i‖² [N] by one of Triton's kernels on patches, some samples at a time."""
        numbers = prod(self.y.shape[3:]) * self.y.shape[1] * prod(self.shape[1:])
        parts = at_a_time(self.samples, numbers * self.like.element_size(), self.like)
        return torch.cat([squares(self.only(i).patches()) for i in parts])

    def squares_by_gram(self) -> Tensor:
        """Return ‖g_i‖² [N] by the Gram form, but for samples where it cancels."""
        wider, found = WIDER[self.like.dtype], []
        for some in self.parts_by_gram(wider):
            of = self.only(some)
            squares, doubtful = sums(*of.inner_products(wider), self.shape[0] + prod(self.shape[1:]), self.like.dtype)
            if doubtful.any():
                squares[doubtful] = PerSample.squares(replace(of, x=of.x[doubtful], y=of.y[doubtful])).to(wider)
            found.append(squares.to(wide(self.like.dtype)))
        return torch.cat(found)

    def squares_by_gram_fused(self, allowed: float | None = None) -> Tensor:
        """Return ‖g_i‖² [N] by Triton kernels in the Gram form, but for samples where its rounding might show."""
        from backends.ops.gram_kernel import sums_and_errors  # triton need not be installed

        exactly = self.like.dtype == torch.float32 and not precision.tf32_in_products()
        numbers, found = (self.shape[0], prod(self.shape[1:])), []
        for some in self.parts_by_gram(torch.float32):
            of = self.only(some)
            known = sums_and_errors(*of.inner_products(self.like.dtype), numbers, exactly)
            found.append(product_of(of).squares(known, shows(self.like) if allowed is None else allowed))
        return torch.cat(found)

    def gram_by_pixels(self) -> Tensor:
        """Return ⟨g_i, g_j⟩ [N, N] as Σ_ts ⟨y_it, y_js⟩ ⟨patch_it, patch_js⟩, if its rounding cannot show anywhere."""
        wider, positions, lengths = WIDER[self.like.dtype], self.positions(), []
        found = self.like.new_empty(self.samples, self.samples, dtype=wider)
        all_images, all_pixels = (t.flatten(0, 1)[None].to(wider) for t in (self.x, self.pixels()))
        for some in self.parts_by_gram(wider, self.samples):
            n, many, after = len(range(self.samples)[some]), self.x.shape[1], slice(some.start, None)
            images, pixels = all_images[:, some.start * many :], all_pixels[:, some.start * positions :]
            lefts = inner_products(pixels[:, : n * positions], pixels)
            rights = products_of_patches(images[:, : n * many], self.windows(), images)
            left, right = (t.diagonal(dim1=1, dim2=2).sqrt() for t in (lefts, rights))
            lengths.append((left * right).view(n, positions))
            products = (lefts * rights).view(n, positions, -1, positions).sum((1, 3))
            found[some, after], found[after, some] = products, products.mT
        numbers = self.shape[0] + prod(self.shape[1:])
        sure = exact(found.diagonal(), torch.cat(lengths), numbers, self.like.dtype)
        return found.to(self.like.dtype) if sure.all() else super().gram()

    def parts_by_gram(self, dtype: torch.dtype, others: int = 1) -> list[slice]:
        """Return slices of as many samples as have their inner products, with those of so many others, at a time."""
        numbers = (self.pairs() + self.positions() ** 2) * others
        return at_a_time(self.samples, numbers * dtype.itemsize, self.like)

    def inner_products(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return those of the pixels of y and of the patches of x, with each other [N, T, T], computed from a dtype."""
        return inner_products(self.pixels().to(dtype)), products_of_patches(self.x.to(dtype), self.windows())

    def pixels(self) -> Tensor:
        """Return those of y, [N, T, P]."""
        return self.y.movedim(2, -1).flatten(1, -2)

    def multiplied(self) -> int:
        """Return how many multiplications a sample's norm takes in the Gram form."""
        return self.pairs() * self.x.shape[2] + self.positions() ** 2 * self.shape[0]

    def windows(self) -> tuple[Window, ...]:
        """Return how x is read in each dimension."""
        of = (self.shape[2:], self.stride, self.padding, self.dilation, self.x.shape[3:], self.y.shape[3:])
        return _windows(*of)

    def pairs(self) -> int:
        """Return how many pairs of a sample's pixels the Gram form multiplies."""
        return pairs(self.x.shape[1], self.windows())

    def weighted(self, factors: Tensor, empty: Empty = fresh) -> Tensor:  # noqa: D102
        y = scaled(self.y, factors)
        return self.gradient(self.x.flatten(0, 1), y.flatten(0, 1), self.shape, self.groups)

    def gradient(self, x: Tensor, y: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
        """Return the weight gradient of an ordinary convolution, by torch."""
        like, none = y.new_empty(shape), [0] * len(self.stride)  # of the weight only the shape is looked at
        options = (self.stride, self.padding, self.dilation, False, none, groups, (False, True, False))
        gradient: Tensor = torch.ops.aten.convolution_backward.default(y, x, like, None, *options)[1]
        return gradient

    def patches(self) -> Outer:
        """Return the same as gradients of a matrix [P, C·kernel] that each patch of x went through; one group only."""
        n, b, p, *size = self.y.shape
        x = self.x.flatten(0, 1)
        if any(self.padding):
            x = F.pad(x, [side for pad in reversed(self.padding) for side in (pad, pad)])
        image, channel, *pixel = x.stride()
        along = [s * d for s, d in zip(pixel, self.dilation, strict=True)]
        across = [s * d for s, d in zip(pixel, self.stride, strict=True)]
        shape = (n, b, x.shape[1], *self.shape[2:], *size)
        patches = x.as_strided(shape, (b * image, image, channel, *along, *across), x.storage_offset())
        d = prod(self.shape[1:])
        left = self.y.movedim(1, 2).reshape(n, p, -1)
        return Outer(left.mT, patches.movedim(1, len(size) + 2).reshape(n, d, -1).mT)


@lru_cache
def _geometry(image: tuple[int, ...], shape: tuple[int, ...], *options: tuple[int, ...]) -> str:
    """Return what stride, padding and dilation there are; cached, as it is asked for at each part of each batch."""
    named = zip(("stride", "padding", "dilation"), options, (1, 0, 1), strict=True)
    unusual = [f"{name} {'×'.join(map(str, value))}" for name, value, usual in named if set(value) != {usual}]
    return ", ".join([f"weight {'×'.join(map(str, shape))}", f"input {'×'.join(map(str, image))}", *unusual])


@lru_cache
def _windows(*of: tuple[int, ...]) -> tuple[Window, ...]:
    return tuple(Window(*each) for each in zip(*of, strict=True))
