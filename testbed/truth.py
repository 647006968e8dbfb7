"""What is right for one problem and quantity: the float64 truth, and runs in its own dtype that show what that allows.

The truth is what the reference backend computes in float64; the yardstick is what it computes in the run's dtype. Norms
and clipped sums have a second one, by torch's own norm and an ordinary backward pass, which round more.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from backends import get_backend, precision, reference
from backends.base import LossFn, clip_factors, full_copy, trainable
from backends.batch import Batch, apply, take
from testbed.agreement import PER_SAMPLE, Draw, Result, Rows, as_rows, distance, norms
from testbed.ordinary import ordinary_norms, weighted_gradient
from testbed.problems import Problem
from testbed.processes.store import Store
from testbed.samples import batch_of, choose, narrow

FEW = 16
TF32 = 2.0**-11  # unit roundoff: products are rounded to ten bits of mantissa
ROUNDED = 2**20  # which draw stands for that, far from those of a cloud
BUDGET = 2**30  # bytes of float64 truth: checking takes a bounded share of memory and time
INDEPENDENT = ("grads", "norms")  # quantities where a sample's row depends on that sample only


class Truth:
    """Truth and yardsticks of one quantity on a problem's batch, or on its fresh one; computed when first asked.

    With `autocast` the yardsticks run under it too: a result is held to what its arithmetic allows.

    Attributes:
        run: The problem, with as many of its samples as are checked: all of them, or a random choice where the truth
            would take more than `BUDGET` bytes and a sample's row depends on that sample only.
        chosen: Which samples of the whole batch these are; None where they are all.
        n: How many there are in the whole batch.
        wide: The same in float64.
        few: The same with at most that many samples: question 1 is about logic, which a few samples show.
        u: The unit roundoff of the arithmetic where it is coarser than the dtype's; None where it is not.
    """

    def __init__(
        self,
        problem: Problem,
        quantity: str,
        options: Mapping[str, Any],
        few: int = FEW,
        autocast: str | None = None,
        store: Store | None = None,
    ) -> None:
        self.quantity, self.options, self.store = quantity, dict(options), store
        self.autocast, self.u = autocast, _roundoff(problem, autocast)
        numbers = sum(p.numel() for p in trainable(problem.model).values()) if quantity == "grads" else 1
        most = max(FEW, BUDGET // (8 * numbers)) if quantity in INDEPENDENT else problem.n
        self.n, self.chosen = problem.n, choose(problem.n, most)
        self.run = problem if self.chosen is None else narrow(problem, self.chosen)
        self.wide = self.run.to(torch.float64)
        index = choose(self.wide.n, few)
        self.few = self.wide if index is None else narrow(self.wide, index)
        self._known: dict[tuple[str, bool], Result] = {}

    def exact(self, *, fresh: bool = False) -> Result:
        """Return what the reference computes in float64, of the samples that are checked."""
        return self._reference("wide", self.wide, fresh)

    def exact_of_few(self) -> Result:
        """Return what the reference computes in float64, of the few samples."""
        return self.exact() if self.few is self.wide else self._reference("few", self.few, fresh=False)

    def runs(self, *, fresh: bool = False) -> list[Result]:
        """Return the yardsticks, and what rounds more and is right as well."""
        return [*self.yardsticks(fresh=fresh), *self._ordinary(fresh), *self._rounded(fresh)]

    def yardsticks(self, *, fresh: bool = False) -> list[Result]:
        """Return what the reference computes in the run's dtype; on CUDA twice, to see nondeterminism."""
        runs = ["run", "run again"] if self.run.device.type == "cuda" else ["run"]
        return [self._reference(which, self.run, fresh) for which in runs]

    def nondeterminism(self) -> float:
        """Return how far two runs of the reference are apart, relative to the result; 0 where they are equal."""
        first, *others = (as_rows(y, self.quantity) for y in self.yardsticks())
        total = norms(first).nan_to_num(0, 0, 0).norm()
        gaps = [distance(other, {k: t.double() for k, t in first.items()}).norm() for other in others]
        return max((float(gap / total) for gap in gaps if gap), default=0.0)

    def draws(self, *, fresh: bool = False) -> Draw:
        """Return the function that draws perturbed runs of the reference in the run's dtype."""
        return self._draw(self.run, fresh)

    def draws_of_few(self) -> Draw:
        """Return the same of the few samples, in float64."""
        return self._draw(self.few, fresh=False)

    def share(self, *, fresh: bool, few: bool) -> None:
        """Compute what will be asked for, perhaps also of few samples, where others take it from the store."""
        if self.store is None:
            return
        self.store.drop("truth *")  # of the quantity before, and of the other batch
        self.exact(fresh=fresh)
        self.runs(fresh=fresh)
        if few:
            self.exact_of_few()
        self.forget()

    def forget(self) -> None:
        """Let go of what the store has: while others are timed, it would take memory for nothing."""
        if self.store is not None:
            self._known.clear()

    def _ordinary(self, fresh: bool) -> list[Result]:
        """Return what torch's own ops make of norms or of a clipped sum, a second yardstick.

        The reference sums squares block by block. torch's norm of a long row keeps so few running sums on a CPU that it
        is off by 4e-5 for 2 million float32 numbers. And the reference adds up a sample, then the samples. An ordinary
        backward pass may add up all their terms in one go: a token that fills up every sequence has thousands.
        """
        if self.quantity not in ("norms", "clipped_sum"):
            return []
        key, problem, batch = ("ordinary", fresh), self.run, batch_of(self.run, fresh)

        def compute() -> Result:
            norms = ordinary_norms(problem, batch, self.autocast)
            if self.quantity == "norms":
                return norms
            factors = clip_factors(norms, self.options.get("max_norm", 1.0))
            return weighted_gradient(problem, batch, factors, self.autocast)

        if key not in self._known:
            self._known[key] = self._shared("ordinary", fresh, compute)
        found = self._known[key]
        tensors = [found] if isinstance(found, Tensor) else list(found.values())
        return [found] if all(t.isfinite().all() for t in tensors) else []  # one of NaN measures nothing

    def _rounded(self, fresh: bool) -> list[Result]:
        """Return what the reference computes at inputs and parameters moved by a rounding to TF32, where it is allowed.

        It is allowed, not asked for: for one sample at a time, libraries may take kernels that round to float32 (H100,
        SimpleCNN: off by 2e-7, where gradients by products of the batch are off by 2e-3, most of it at kinks).
        """
        if self.u != TF32 or self.autocast:
            return []
        key = ("rounded", fresh)
        if key not in self._known:
            draw = self._draw(self.run, fresh)
            samples = torch.arange(self.run.n if self.quantity in PER_SAMPLE else 1, device=self.run.device)
            self._known[key] = self._shared("rounded", fresh, lambda: draw(ROUNDED, TF32, samples))
        return [self._known[key]]

    def _reference(self, what: str, problem: Problem, fresh: bool) -> Result:
        key = (what, fresh)
        if key not in self._known:
            for old in [k for k in self._known if k[1] != fresh]:
                del self._known[old]  # the results on two batches of a large problem need not fit together
            self._known[key] = self._shared(
                what, fresh, lambda: self._compute(problem.model, problem.loss_fn, *batch_of(problem, fresh))
            )
        return self._known[key]

    def _shared(self, what: str, fresh: bool, compute: Callable[[], Result]) -> Result:
        """Return what the reference computes, from the store where another process has computed it."""
        if self.store is None:
            return compute()
        options = zlib.crc32(repr(sorted(self.options.items())).encode())
        batch = "fresh" if fresh else "batch"
        arithmetic = f" {self.autocast}" if self.autocast else ""
        return self.store.kept(f"truth {self.quantity} {options:08x} {what} {batch}{arithmetic}", compute)

    def _compute(self, model: torch.nn.Module, loss_fn: LossFn, inputs: Batch, targets: Tensor) -> Result:
        fn = getattr(get_backend(reference(), autocast=self.autocast), self.quantity)(model, loss_fn, **self.options)
        found: Result = fn(inputs, targets)  # autocast leaves float64 alone
        return found

    def _draw(self, problem: Problem, fresh: bool) -> Draw:
        """Return the function that draws the reference's rows at inputs and parameters moved by a few roundings."""
        inputs, targets = batch_of(problem, fresh)

        def draw(k: int, size: float, rows: Tensor) -> Rows:
            generator = torch.Generator(problem.device).manual_seed(k)

            def moved(t: Tensor) -> Tensor:
                if not t.is_floating_point():
                    return t
                noise = torch.randn(t.shape, generator=generator, device=t.device, dtype=torch.float64)
                return (t.detach().double() * (1 + size * noise)).to(t.dtype)

            model = full_copy(problem.model)
            for p in model.parameters():
                p.data = moved(p)
            if self.quantity in INDEPENDENT:
                inputs_, targets_ = take(inputs, rows), take(targets, rows)
                return as_rows(self._compute(model, problem.loss_fn, apply(moved, inputs_), targets_), self.quantity)
            found = as_rows(self._compute(model, problem.loss_fn, apply(moved, inputs), targets), self.quantity)
            return {name: t[rows] for name, t in found.items()}

        return draw


def telling_max_norm(norms: Tensor) -> float:
    """Return a norm just above the smallest: one sample is not clipped, which shows a wrong scale.

    The others are, which shows a wrong norm.
    """
    return 1.01 * float(norms[norms > 0].min()) if (norms > 0).any() else 1.0


def _roundoff(problem: Problem, autocast: str | None) -> float | None:
    """Return the unit roundoff of the arithmetic where it is coarser than the dtype's; None where it is not."""
    if problem.dtype != torch.float32:
        return None
    if autocast:
        return torch.finfo(getattr(torch, autocast)).eps / 2
    rounded = precision.tf32_in_products() or precision.tf32_in_convolutions()
    return TF32 if rounded and problem.device.type == "cuda" else None
