"""Opacus' GradSampleModule (Yousefpour et al. 2021, https://opacus.ai): per-sample gradients by module hooks.

Modes: `hooks` (a hand-written rule a layer, functorch for the rest), `functorch` (vmap a layer), `ew` (PyTorch's
ExpandedWeights). They are right where the library sees every use of a parameter; elsewhere this file refuses.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from backends.base import (
    Backend,
    GradsFn,
    LossFn,
    Named,
    Unsupported,
    describe,
    first_line,
    guarded,
    own_copy,
    register,
    trainable,
)
from backends.batch import Batch, call, size
from backends.expanded import expanded, normalises_anew
from backends.module_calls import collect, pads_unlike_zeros, quiet_hooks, watcher
from backends.probe import Hooked
from backends.running import batch_gradient, culprit, library_call


@register("opacus", requires={"opacus": "opacus"})
@dataclass(frozen=True)
class Opacus(Backend):
    """`GradSampleModule` as Opacus wraps models.

    Options:
        mode: How Opacus computes a layer's per-sample gradient.
    """

    mode: Literal["hooks", "functorch", "ew"] = "hooks"

    def grads(self, model: nn.Module, loss_fn: LossFn) -> GradsFn:
        """Build the wrapped model; see the contract."""
        from opacus.grad_sample import wrap_model

        ew = self.mode == "ew"
        watching = watcher("Opacus", model, self._hooked, functions=expanded if ew else None, repeats=True)
        plain, model = own_copy(model), own_copy(model)
        parameters = trainable(model)
        self._refuse_options(model)
        hooked = list(self._hooked(model))
        if guarded():
            _refuse_hooked_twice(model, hooked)
        try:
            wrapped = wrap_model(model, grad_sample_mode=self.mode, loss_reduction="sum")
        except NotImplementedError as error:
            raise Unsupported(f"{culprit(error, model)}: {first_line(error)}") from error
        _capture_in_eval(hooked)

        def fn(inputs: Batch, targets: Tensor) -> Named:
            with watching(inputs) as new:
                wrapped.zero_grad(set_to_none=True)
                with quiet_hooks(), library_call(plain, model, loss_fn, inputs, targets):
                    torch.autograd.backward(loss_fn(call(wrapped, inputs), targets).sum())
                totals = batch_gradient(plain, loss_fn, inputs, targets) if ew and new else None
                return collect("Opacus", parameters, "grad_sample", size(inputs), verify=new, totals=totals)

        return fn

    def _refuse_options(self, model: nn.Module) -> None:
        """Refuse the layer options that Opacus does not look at, or does not support."""
        for path, module in model.named_modules():
            if not any(p.requires_grad for p in module.parameters(recurse=False)):
                continue
            if self.mode != "ew" and any(True for _ in module.buffers()):
                raise Unsupported(f"{describe(path, module)} has parameters and buffers, which Opacus does not support")
            for wrong in WRONG[self.mode] if guarded() else ():
                if reason := wrong(module):
                    raise Unsupported(f"{describe(path, module, options=True)}: {reason}")
            if guarded() and self.mode == "hooks" and type(module) is nn.Conv2d and module.weight.requires_grad:
                module.register_forward_pre_hook(partial(_refuse_strides, describe(path, module)))

    def _hooked(self, model: nn.Module) -> Iterator[Hooked]:
        """Yield the modules that Opacus hooks, as its `iterate_submodules` does, and what each rule covers."""
        from opacus.grad_sample import GradSampleModule

        if self.mode == "ew":
            return

        def walk(module: nn.Module) -> Iterator[Hooked]:
            owner = any(p.requires_grad for p in module.parameters(recurse=False))
            general = owner and type(module) not in GradSampleModule.GRAD_SAMPLERS
            if owner:
                yield Hooked(module, deep=general, reruns=general or self.mode == "functorch")
            if not general:
                for child in module.children():
                    yield from walk(child)

        yield from walk(model)


def _capture_in_eval(hooked: list[Hooked]) -> None:
    """Make Opacus capture activations of modules in eval mode too: its hook only looks at `module.training`.

    The flag is up just while Opacus' forward hook runs, after the module's forward has run in its own mode.
    """
    for h in hooked:
        if not h.module.training:
            h.module.register_forward_hook(lambda module, *_: setattr(module, "training", True), prepend=True)
            h.module.register_forward_hook(lambda module, *_: setattr(module, "training", False))


Wrong = Callable[[nn.Module], str | None]
"""A layer -> why Opacus would be silently wrong on it, or None; the case that proves it stands beside it."""


def _pads_with_zeros(layer: nn.Module) -> str | None:
    """Case "Conv2d(padding_mode='reflect')"."""
    return "Opacus' rule would pad with zeros; mode 'functorch' pads right" if pads_unlike_zeros(layer) else None


def _trains_padding(layer: nn.Module) -> str | None:
    """Case "Embedding(padding_idx=0)"."""
    padded = isinstance(layer, nn.Embedding) and layer.padding_idx is not None
    return "the padding would get a gradient; in mode 'functorch' it gets none" if padded else None


def _adds_equal_tokens_once(layer: nn.Module) -> str | None:
    """Case "EmbeddingBag offsets"."""
    return "a token that is in a bag twice would count once" if isinstance(layer, nn.EmbeddingBag) else None


def _refuse_hooked_twice(model: nn.Module, hooked: list[Hooked]) -> None:
    """Case "tied: a module under two parents": Opacus' walk meets it twice."""
    found = [id(h.module) for h in hooked]
    for path, module in model.named_modules():
        if found.count(id(module)) > 1:
            raise Unsupported(f"{describe(path, module)} has several parents; Opacus would hook it once for each")


def _refuse_strides(where: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Case "input: channels_last": Opacus' `unfold2d` takes it that the last two axes lie in order."""
    if not inputs[0][:1, :1].is_contiguous():
        raise Unsupported(
            f"{where}: Opacus' rule would misread an input of strides {list(inputs[0].stride())} (channels_last?); "
            "give it a contiguous one, or use mode 'functorch'"
        )


WRONG: dict[str, tuple[Wrong, ...]] = {
    "hooks": (_pads_with_zeros, _trains_padding, _adds_equal_tokens_once),
    "functorch": (),
    "ew": (_trains_padding, normalises_anew),
}
