"""Book-keeping by op: one forward pass, one backward pass without weight gradients, and contractions of pairs.

Each op that has parameters leaves a pair: its input a, and the gradient g of its output. Per-sample gradients, their
norms, clipped sums, variances and inner products are contractions of pairs, and most need no per-sample gradient to be
made (norms: Goodfellow 2015, https://arxiv.org/abs/1510.01799; clipped sums without a second backward pass: Bu et al.
2022, https://arxiv.org/abs/2210.00038). How pairs are had is in `ops/taps.py`, how the passes are run in
`ops/passes.py`, and how it is known to be right in `ops/look.py`; what is known of an op is its rule, in `ops/`.
An op without a rule runs under vmap by itself (`ops/vmapped.py`), in the same passes.

Norms and clipped sums take at most 1.3 times the memory of an ordinary step, or 64 MiB: where a batch would take more,
it is run in parts (`ops/parts.py`), unless it is compiled.

It cannot be fast where samples must be run one at a time, as for most control flow by values, samples that update
buffers in place, checkpoints. Random ops draw for each sample, as they do in a batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

import backends.ops  # noqa: F401  registers the rules
from backends import precision
from backends.base import (
    Backend,
    GradsFn,
    LossFn,
    Named,
    Positive,
    TensorFn,
    check_max_norm,
    clip_factors,
    own_copy,
    register,
    trainable,
)
from backends.batch import Batch, detached, size
from backends.derived import wide
from backends.heap import LARGEST, keep_freed
from backends.ops.choice import CHOSEN, Kernels, fastest_name, kernels, with_kernels
from backends.ops.float16 import unit, without_float16
from backends.ops.pages import Pool, release
from backends.ops.parts import InParts
from backends.ops.passes import Passes, Way
from backends.ops.persample import Dense, PerSample, fresh
from backends.ops.several import Together
from backends.ops.traced import Compiled
from backends.ops.ways import Ways
from backends.running import kept_random_state, library_call

R = TypeVar("R", Tensor, Named)
T = TypeVar("T")
Part: TypeAlias = Tensor | PerSample
"""What is wanted of a parameter's gradients, or these where they are small."""

MUCH = 2  # times the memory of a pair


@register("bookkeeping")
@dataclass(frozen=True)
class Bookkeeping(Backend):
    """One backward pass of output gradients; each quantity is a contraction of pairs (input, output gradient).

    Options:
        reuse_buffers: `grads` writes results where those of its call before are: they are valid until then.
        triton: Measure Triton's kernels too, where there are several ways: on a CUDA device, where Triton is installed.
        unchecked_kernels: Also those of them that no GPU has run yet; the others were checked on an H200.
    """

    own_modes: ClassVar[frozenset[str]] = frozenset({"compile"})  # ops are recorded first

    reuse_buffers: bool = False
    triton: bool = True
    unchecked_kernels: bool = False

    @property
    def keeps_results(self) -> bool:
        """Whether results stay valid after the next call."""
        return not self.reuse_buffers

    @classmethod
    def release(cls) -> None:
        """Give back the memory of results that nobody holds."""
        release()

    def choices(self) -> Mapping[str, str]:
        """Return how the passes of each model are run, and the fastest way for each geometry of convolutions."""
        return dict(CHOSEN)

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the passes that make every g_i; see the contract."""
        pool = Pool()

        def written(name: str, g: PerSample) -> Tensor:
            if self.reuse_buffers:
                return g.grads(partial(pool.same, name)).contiguous()
            return g.grads(pool.empty if g.bytes() > LARGEST else fresh).contiguous()

        fn = self._built(model, self._passes(model, loss_fn), written, _as_they_are)
        return lambda inputs, targets: _apart(fn(inputs, targets))

    def norms(self, model: nn.Module, loss_fn: LossFn) -> TensorFn:
        """Build ‖g_i‖ from pairs."""

        def norms(found: dict[str, Part]) -> Tensor:
            return Together(found).squares().sqrt()

        passes = self._passes(model, loss_fn)
        return self._built(model, passes, _or_small(lambda g: g.squares()), norms, torch.cat)

    def clipped_sum(self, model: nn.Module, loss_fn: LossFn, *, max_norm: Positive = 1.0) -> GradsFn:
        """Build Σ_i min(1, C/‖g_i‖) g_i from the same pairs as the norms."""
        check_max_norm(max_norm)
        pool = Pool()
        passes = self._passes(model, loss_fn)

        def clipped_sum(found: dict[str, tuple[PerSample, Part]]) -> Named:
            names = list(found)
            together = Together({name: part for name, (_, part) in found.items()})
            factors = clip_factors(together.squares().sqrt(), max_norm)
            scale = unit(factors, [g.like.dtype for g, _ in found.values()])
            factors = factors if scale is None else factors / scale
            small = together.weighted(factors)
            for name in small:
                del found[name]
            large = {name: found.pop(name)[0].weighted(factors, pool.empty) for name in list(found)}
            sums = {name: small[name] if name in small else large[name] for name in names}
            return sums if scale is None else {name: scale * t.to(wide(t.dtype)) for name, t in sums.items()}

        return self._built(model, passes, _Keep(pool, passes), clipped_sum, _added)

    def variance(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build 1/N Σ (g_i − ḡ)², some samples at a time."""

        def variance(found: dict[str, Part]) -> Named:
            variances = Together(found).variances()
            return {name: variances[name] for name in found}

        passes = self._passes(model, loss_fn)
        return self._built(model, passes, _or_small(lambda g: g.variance(), without_float16), variance)

    def gram(self, model: nn.Module, loss_fn: LossFn) -> TensorFn:
        """Build ⟨g_i, g_j⟩, the sum over parameters."""
        passes, each = self._passes(model, loss_fn), _or_small(lambda g: g.gram(), without_float16)
        return self._built(model, passes, each, lambda found: Together(found).gram())

    def _passes(self, model: nn.Module, loss_fn: LossFn) -> Ways:
        return Ways(Passes(own_copy(model), loss_fn))

    def _built(
        self,
        model: nn.Module,
        passes: Ways,
        each: Callable[[str, PerSample], T],
        combine: Callable[[dict[str, T]], R],
        merge: Callable[[list[R]], R] | None = None,
    ) -> Callable[[Batch, Tensor], R]:
        """Return the function of (inputs, targets) that both passes and contractions make.

        Args:
            model: The caller's.
            passes: Those of a copy of it.
            each: What is wanted of a parameter's gradients: (name, gradients), as soon as they are known, while the
                backward pass goes on and they are in the cache.
            combine: What came of that, by name -> the result.
            merge: The results of parts of a batch -> that of the batch, if there is a way.
        """
        keep_freed()
        own, loss_fn = passes.of.model, passes.of.loss_fn
        dtypes = {name: p.dtype for name, p in trainable(model).items()}
        device = next((p.device for p in trainable(model).values()), torch.device("cpu"))

        def made(found: dict[str, T]) -> R:
            with torch.no_grad(), precision.without_autocast(device):
                return _cast(combine(found), dtypes)  # type: ignore[no-any-return]

        def passed(inputs: Batch, targets: Tensor) -> R:
            return made(passes(inputs, targets, each))

        def passed_by(way: Way, inputs: Batch, targets: Tensor) -> R:
            passes.extra = 0
            return made(way.run(inputs, targets, each))

        whole = Compiled(passes, passed_by) if self.compile else passed
        what = f"{combine.__name__} of {type(model).__name__}"
        wanted: Kernels = "none" if not self.triton else "all" if self.unchecked_kernels else "checked"
        parts = merge and not self.compile and InParts(whole, passes.of.plain, merge, what)

        def fn(inputs: Batch, targets: Tensor) -> R:
            inputs, targets = detached(inputs), detached(targets)
            passes.whole = size(inputs)
            with kernels(wanted), library_call(model, own, loss_fn, inputs, targets, buffers=False):
                if not parts:
                    return whole(inputs, targets)
                if not parts.knows(inputs, targets):
                    with kept_random_state(own):  # a first call draws what later ones draw
                        parts.choose(inputs, targets)
                return parts(inputs, targets)

        return fn


def _or_small(
    wanted: Callable[[PerSample], Tensor], of: Callable[[PerSample], PerSample] = lambda g: g
) -> Callable[[str, PerSample], Part]:
    """Return what is wanted of a parameter's gradients, as a function that leaves small ones as they are."""

    def each(name: str, g: PerSample) -> Part:
        g = of(g)
        return g if g.is_small() else wanted(g)

    return each


class _Keep:
    """What a clipped sum keeps of each parameter's gradients until all norms are known, and their squares.

    Squares mostly come of the gradients themselves. They are kept, and weighted later, where that takes less memory
    than the pairs they are made of, or more and there is some to spare: a part of a batch may take what the rest of it
    would.
    """

    def __init__(self, pool: Pool, passes: Ways) -> None:
        self.pool, self.passes = pool, passes

    def __call__(self, name: str, g: PerSample) -> tuple[PerSample, Part]:
        passes, more = self.passes, g.bytes() - g.held()
        if g.held() and more <= passes.footprint.spare(g.samples, passes.whole) - passes.extra and self._pays(g):
            passes.extra += max(0, more)
            g = Dense(g.grads(self.pool.empty))
        return g, without_float16(g) if g.is_small() else g.squares()

    def _pays(self, g: PerSample) -> bool:
        """Return whether keeping takes less time; it does where norms take gradients, and these not much memory."""
        much = g.bytes() > MUCH * g.held()
        if g.is_small() or not (much or with_kernels(g.like)):
            return True

        def weighted(g: PerSample) -> Tensor:
            return g.weighted(g.squares())

        ways = {"kept": lambda: weighted(Dense(g.grads(self.pool.empty))), "made anew": lambda: weighted(g)}
        if much:  # the first one is taken where nothing can be measured
            ways = dict(reversed(ways.items()))
        return fastest_name(ways, f"clipped sums of {g.geometry()}", g.samples, g.like) == "kept"


def _cast(result: Any, dtypes: Mapping[str, torch.dtype]) -> Any:  # noqa: ANN401  what `combine` returns
    """Return a result in the parameters' dtypes: under autocast, pairs are not."""
    if isinstance(result, Tensor):
        return result.to(next(iter(dtypes.values())))
    return {name: t.to(dtypes[name]) for name, t in result.items()}


def _apart(found: Named) -> Named:
    """Return tensors none of which shares another one's memory: autograd may give one to several parameters."""
    seen: set[int] = set()
    for name, t in found.items():
        place = t.untyped_storage().data_ptr()
        found[name] = t.clone() if place in seen else t
        seen.add(place)
    return found


def _as_they_are(found: Named) -> Named:
    return found


def _added(parts: list[Named]) -> Named:
    """Return the sum of parts, in the memory of the first one; half precision is summed in one go, in float32."""
    total, *others = parts
    for name, t in total.items():
        if wide(t.dtype) != t.dtype:
            total[name] = torch.stack([part[name] for part in parts]).sum(0)
        else:
            for part in others:
                t += part[name]
    return total
