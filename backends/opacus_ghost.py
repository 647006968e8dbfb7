"""Ghost clipping as Opacus does it: norms and clipped sums without per-sample gradients of the layers it has rules for.

Li et al. 2022 (https://arxiv.org/abs/2110.05679); Opacus' `GradSampleModuleFastGradientClipping`. A first backward pass
leaves the norms, a second one of the weighted losses is the clipped sum. Linear and Embedding have rules; gradients of
other layers are built, normed and freed. Where the norm of a long sequence cancels, Opacus clamps it to zero: such a
result does not agree.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from backends.base import (
    Backend,
    GradsFn,
    LossFn,
    Named,
    Positive,
    TensorFn,
    Unsupported,
    check_max_norm,
    clip_factors,
    own_copy,
    register,
    trainable,
)
from backends.batch import Batch, call, detached, size
from backends.module_calls import collect, quiet_hooks, watcher
from backends.opacus_hooks import HOOK_RULES, hooked_by_opacus, refuse_options, wrapped_by_opacus
from backends.probe import Hooked
from backends.running import library_call
from backends.verify import refuse_nonlinear, verify_rows


@register("opacus_ghost", requires={"opacus": "opacus"})
@dataclass(frozen=True)
class OpacusGhost(Backend):
    """Opacus' ghost clipping: `norms` and `clipped_sum` only.

    Options:
        clipping: Norms of Linear and Embedding without their gradients (ghost), or of all layers from them (fast).
    """

    quantities: ClassVar[tuple[str, ...]] = ("norms", "clipped_sum")

    clipping: Literal["ghost", "fast"] = "ghost"

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Refuse: that is the point of it."""
        raise Unsupported("`model`: ghost clipping has no per-sample gradients, only norms and clipped sums")

    def norms(self, model: nn.Module, loss_fn: LossFn) -> TensorFn:
        """Build the wrapped model; the norms are those of its first backward pass."""
        return self._build(model, loss_fn, lambda norms, losses, parameters: norms)

    def clipped_sum(self, model: nn.Module, loss_fn: LossFn, *, max_norm: Positive = 1.0) -> GradsFn:
        """Build the wrapped model; a second backward pass takes the losses weighted by the clip factors."""
        check_max_norm(max_norm)

        def second(norms: Tensor, losses: Tensor, parameters: dict[str, nn.Parameter]) -> Named:
            # Opacus' own factors are C / (‖g_i‖ + 1e-6): not the definition where norms are small
            weighted = (clip_factors(norms, max_norm).to(losses.dtype) * losses).sum()
            grads = torch.autograd.grad(weighted, list(parameters.values()), materialize_grads=True)
            dense = (g.to_dense() if g.is_sparse else g for g in grads)
            return dict(zip(parameters, dense, strict=True))

        return self._build(model, loss_fn, second, weights=True)

    def _build(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        finish: Callable[[Tensor, Tensor, dict[str, nn.Parameter]], Any],
        weights: bool = False,
    ) -> Callable[[Batch, Tensor], Any]:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        def hooked(model: nn.Module) -> list[Hooked]:
            return hooked_by_opacus(model, functorch=False)

        def repeats(module: nn.Module) -> bool:
            by_rule = type(module) in GradSampleModuleFastGradientClipping.NORM_SAMPLERS
            return self.clipping == "fast" or not by_rule

        watching = watcher("Opacus", model, hooked, repeats=repeats)
        plain, model = own_copy(model), own_copy(model)
        parameters = trainable(model)
        refuse_options(model, HOOK_RULES)
        wrapped = wrapped_by_opacus(
            model, hooked(model), grad_sample_mode="ghost", use_ghost_clipping=self.clipping == "ghost"
        )

        def fn(inputs: Batch, targets: Tensor) -> Any:  # noqa: ANN401
            inputs, targets = detached(inputs), detached(targets)
            with (
                watching(inputs) as new,
                quiet_hooks(),
                library_call(plain, model, loss_fn, inputs, targets),
            ):
                if new and weights:
                    refuse_nonlinear("Opacus", plain, loss_fn, inputs, targets)
                losses = loss_fn(call(wrapped, inputs), targets)
                torch.autograd.backward(losses.sum(), retain_graph=True)
                found = collect("Opacus", parameters, "_norm_sample", size(inputs), shape=lambda n, p: (n,))
                norms = torch.linalg.vector_norm(torch.stack(list(found.values())), dim=0)
                if new:
                    verify_rows("Opacus", norms, plain, loss_fn, inputs, targets)
                wrapped.disable_hooks()
                try:
                    return finish(norms, losses, parameters)
                finally:
                    wrapped.enable_hooks()

        return fn
