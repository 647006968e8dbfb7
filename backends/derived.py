"""What is derived from per-sample gradients, a few samples at a time: N × parameters is never held.

Each function takes `grads`, which returns {name: [k, *shape]} for k samples, and returns the function of the whole
batch. Half precision is accumulated in float32.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import ceil
from typing import TypeAlias

import torch
from torch import Tensor

from backends import precision
from backends.batch import Batch, size, take

Named: TypeAlias = dict[str, Tensor]
"""A tensor for each trainable parameter, by its `named_parameters()` name."""

GradsFn: TypeAlias = Callable[[Batch, Tensor], Named]
"""(inputs, targets) -> {name: [N, *parameter.shape]}."""

TensorFn: TypeAlias = Callable[[Batch, Tensor], Tensor]
"""(inputs, targets) -> one tensor."""

HELD_BYTES = 2**30  # by a Gram matrix: less would be computed again for every block
CPU_BYTES = 2**25  # glibc takes larger blocks fresh from the system: vmap's norms then take 1.3× as long
BLOCK = 1024  # numbers whose squares are summed at a time
GPU_SHARE = 8  # of a GPU's memory, so that activations have room beside a chunk


def norms(grads: GradsFn, most: int) -> TensorFn:
    """Return the function for ‖g_i‖₂ [N], `most` samples at a time."""

    def fn(inputs: Batch, targets: Tensor) -> Tensor:
        return torch.cat([norms_of(grads(*chunk)) for chunk in chunks(inputs, targets, most)])

    return fn


def clipped_sum(grads: GradsFn, most: int, max_norm: float) -> GradsFn:
    """Return the function for Σ_i min(1, C/‖g_i‖) g_i, `most` samples at a time."""
    check_max_norm(max_norm)

    def one(inputs: Batch, targets: Tensor) -> Named:
        g = grads(inputs, targets)
        factors = clip_factors(norms_of(g), max_norm)
        return {name: weighted_sum(factors, t) for name, t in g.items()}

    def fn(inputs: Batch, targets: Tensor) -> Named:
        parts = (one(*chunk) for chunk in chunks(inputs, targets, most))
        total = next(parts)
        if size(inputs) <= most:
            return total
        summed = {name: t.to(wide(t.dtype)) for name, t in total.items()}
        for part in parts:
            for name, t in part.items():
                summed[name] += t
        return {name: summed[name].to(t.dtype) for name, t in total.items()}

    return fn


def variance(grads: GradsFn, most: int) -> GradsFn:
    """Return the function for the elementwise 1/N Σ (g_i − ḡ)², `most` samples at a time."""

    def fn(inputs: Batch, targets: Tensor) -> Named:
        found: dict[str, Moments] = defaultdict(Moments)
        for chunk in chunks(inputs, targets, most):
            for name, g in grads(*chunk).items():
                found[name].add(g)
        return {name: moments.variance() for name, moments in found.items()}

    return fn


class Moments:
    """Mean and squared deviations of gradients, of some samples after others.

    Those of parts are merged (Chan, Golub, LeVeque 1979), which cancels nothing; the plain difference of second moment
    and squared mean would.
    """

    samples = 0

    def add(self, g: Tensor) -> None:
        """Take the gradients [n, *shape] of further samples."""
        self.dtype, g, n = g.dtype, g.to(wide(g.dtype)), len(g)
        mean, squares = g[0], None  # one sample is its own mean
        if n > 1:
            mean = g.mean(0)
            squares = g.sub(mean).square_().sum(0)  # torch.var takes ten times as long along the first axis on a CPU
        if not self.samples:
            self.mean, self.squares = (mean.clone(), torch.zeros_like(mean)) if squares is None else (mean, squares)
        else:
            gap, total = mean - self.mean, self.samples + n
            self.mean.add_(gap, alpha=n / total)
            self.squares.addcmul_(gap, gap, value=self.samples * n / total)
            if squares is not None:
                self.squares.add_(squares)
        self.samples += n

    def variance(self) -> Tensor:
        """Return 1/N Σ (g_i − ḡ)² [*shape]."""
        return self.squares.div_(self.samples).to(self.dtype)


def variance_of(grads: Tensor) -> Tensor:
    """Return 1/N Σ (g_i − ḡ)² [*shape] of per-sample gradients [N, *shape]."""
    moments = Moments()
    moments.add(grads)
    return moments.variance()


def gram(grads: GradsFn, most: int, held: int) -> TensorFn:
    """Return the function for ⟨g_i, g_j⟩ [N, N]: blocks of `held` samples, against all others `most` at a time.

    The gradients of N samples are computed once for each block, so that memory is bounded; one block is one pass.
    """

    def fn(inputs: Batch, targets: Tensor) -> Tensor:
        n = size(inputs)
        blocks = slices(n, held)
        rows: list[Tensor] = []
        for block in blocks:
            parts = [rows_of_all(grads(*chunk)) for chunk in chunks(take(inputs, block), targets[block], most)]
            kept = [torch.cat(columns) if len(columns) > 1 else columns[0] for columns in zip(*parts, strict=True)]
            del parts
            own = _products(kept, kept)
            later = slice(block.stop, n)
            strips = [own]
            if block.stop < n:
                for chunk in chunks(take(inputs, later), targets[later], most):
                    strips.append(_products(kept, rows_of_all(grads(*chunk))))
            rows.append(torch.cat(strips, 1))
            del kept
        upper = rows[0].new_zeros(n, n)
        for block, strip in zip(blocks, rows, strict=True):
            upper[block, block.start :] = strip
            upper[block.start :, block] = strip.T
        return upper

    return fn


def default_bytes(parameters: Sequence[Tensor], *, held: bool = False) -> int:
    """Return how many bytes of per-sample gradients are computed at a time, or held by a Gram matrix, by default."""
    device = next((p.device for p in parameters), torch.device("cpu"))
    if device.type != "cuda":
        return HELD_BYTES if held else CPU_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory) // GPU_SHARE


def chunks(inputs: Batch, targets: Tensor, most: int) -> Iterator[tuple[Batch, Tensor]]:
    """Yield the batch in parts of `most` samples or fewer, as even as can be."""
    for part in slices(size(inputs), most):
        yield take(inputs, part), targets[part]


def slices(n: int, most: int) -> list[slice]:
    """Return slices of N samples, `most` or fewer in each, as even as can be."""
    count = ceil(n / most)
    ends = [round(n * i / count) for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def rows_of(grads: Tensor) -> Tensor:
    """Return per-sample gradients [N, *shape] as rows [N, numbers]; a scalar parameter's have one number each."""
    return grads if grads.dim() == 2 else grads.flatten(1) if grads.dim() > 2 else grads[:, None]


def rows_of_all(grads: Named) -> list[Tensor]:
    """Return the rows of each parameter."""
    return [rows_of(t) for t in grads.values()]


def _products(a: list[Tensor], b: list[Tensor]) -> Tensor:
    with precision.without_autocast(a[0].device):
        return torch.stack([x @ y.T for x, y in zip(a, b, strict=True)]).sum(0)


def norms_of(grads: Named) -> Tensor:
    """Return ‖g_i‖₂ [N] of per-sample gradients; half precision is summed in float32."""
    squares = [squares_of(t) for t in grads.values()]
    return torch.stack(squares).sum(0).sqrt().to(next(iter(grads.values())).dtype)


def squares_of(grads: Tensor) -> Tensor:
    """Return ‖g_i‖² [N] of per-sample gradients [N, *shape] of a parameter, in float32 at least.

    Block by block: on a CPU `vector_norm` of a long row keeps so few running sums that they lose digits (one of 1.2
    million float32 numbers is off by 1.5e-5, 250 roundings).
    """
    rows, dtype = rows_of(grads), wide(grads.dtype)
    whole = rows.shape[1] // BLOCK * BLOCK if rows.device.type == "cpu" else 0
    squares: Tensor
    if not whole:
        squares = torch.linalg.vector_norm(rows, dim=1, dtype=dtype).square()
        return squares
    blocks = rows[:, :whole].unflatten(1, (-1, BLOCK))
    squares = torch.linalg.vector_norm(blocks, dim=2, dtype=dtype).square().sum(1)
    if whole < rows.shape[1]:
        squares += torch.linalg.vector_norm(rows[:, whole:], dim=1, dtype=dtype).square()
    return squares


def check_max_norm(max_norm: float) -> None:
    """Refuse a norm to clip to that would turn gradients round.

    Raises:
        ValueError: It is no number above 0.
    """
    if not isinstance(max_norm, int | float) or not max_norm > 0:
        raise ValueError(f"max_norm should be a number above 0, found {max_norm!r}")


def clip_factors(norms: Tensor, max_norm: float) -> Tensor:
    """Return min(1, C/‖g_i‖) [N]; a zero gradient has factor 1, a nonfinite norm a nonfinite or zero factor."""
    return (max_norm / norms).clamp(max=1.0)


def weighted_sum(weights: Tensor, grads: Tensor) -> Tensor:
    """Return Σ_i w_i g_i [*shape] of weights [N] and per-sample gradients [N, *shape]."""
    with precision.without_autocast(grads.device):  # einsum takes three times as long on few numbers
        return (weights.to(grads.dtype) @ rows_of(grads)).view(grads.shape[1:])


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients are accumulated: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
