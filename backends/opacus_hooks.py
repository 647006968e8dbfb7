"""What Opacus' module hooks would get wrong, and how they are made to see what they would miss: no backend."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from backends.base import Unsupported, Wrong, describe, first_line, guarded, owns_trained, refuse_wrong
from backends.expanded import trains_padding
from backends.module_calls import pads_unlike_zeros
from backends.probe import Hooked
from backends.running import culprit


def wrapped_by_opacus(model: nn.Module, hooked: Sequence[Hooked], **options: Any) -> Any:  # noqa: ANN401  no types there
    """Return the model as Opacus wraps it, capturing in eval mode too; its losses are summed.

    Args:
        model: A copy that Opacus may hook.
        hooked: What `hooked_by_opacus` says of it.
        options: `grad_sample_mode` and what else `opacus.grad_sample.wrap_model` takes.

    Raises:
        Unsupported: Opacus refuses the model.
    """
    from opacus.grad_sample import wrap_model

    if guarded():
        _refuse_hooked_twice(model, hooked)
    try:
        wrapped = wrap_model(model, loss_reduction="sum", **options)
    except NotImplementedError as error:
        raise Unsupported(f"{culprit(error, model)}: {first_line(error)}") from error
    _capture_in_eval(hooked)
    model.register_forward_pre_hook(lambda *_: _forget(hooked), prepend=True)
    return wrapped


def hooked_by_opacus(model: nn.Module, *, functorch: bool) -> list[Hooked]:
    """Return the modules that Opacus hooks, as its `iterate_submodules` does, and what each rule covers."""
    from opacus.grad_sample import GradSampleModule

    def walk(module: nn.Module) -> Iterator[Hooked]:
        owner = owns_trained(module)
        general = owner and type(module) not in GradSampleModule.GRAD_SAMPLERS
        if owner:
            yield Hooked(module, deep=general, reruns=general or functorch)
        if not general:
            for child in module.children():
                yield from walk(child)

    return list(walk(model))


def refuse_options(model: nn.Module, rules: Sequence[Wrong], *, buffers: bool = True, strides: bool = True) -> None:
    """Refuse the layer options that Opacus does not look at, or does not support.

    Args:
        model: The model; it may get hooks.
        rules: What Opacus would get wrong.
        buffers: Refuse layers with parameters and buffers, as Opacus itself does.
        strides: Refuse inputs of Conv2d, once they come, whose strides Opacus' own rule would misread.
    """
    for path, module in model.named_modules():
        if not owns_trained(module):
            continue
        if buffers and any(True for _ in module.buffers()):
            raise Unsupported(f"{describe(path, module)} has parameters and buffers, which Opacus does not support")
        refuse_wrong(path, module, rules)
        if guarded() and strides and type(module) is nn.Conv2d and module.weight.requires_grad:
            module.register_forward_pre_hook(partial(_refuse_strides, describe(path, module)))


def _capture_in_eval(hooked: Sequence[Hooked]) -> None:
    """Make Opacus capture activations of modules in eval mode too: its hook only looks at `module.training`.

    The flag is up just while Opacus' forward hook runs, after the module's forward has run in its own mode.
    """
    for h in hooked:
        if not h.module.training:
            h.module.register_forward_hook(lambda module, *_: setattr(module, "training", True), prepend=True)
            h.module.register_forward_hook(lambda module, *_: setattr(module, "training", False))


def _forget(hooked: Sequence[Hooked]) -> None:
    """Drop what a call left that failed after its forward pass: Opacus would wait for the backward pass of it."""
    for h in hooked:
        vars(h.module).pop("activations", None)
        for p in h.module.parameters():
            vars(p).pop("_current_grad_sample", None)
            p._forward_counter = 0  # type: ignore[attr-defined]


def _pads_with_zeros(layer: nn.Module) -> str | None:
    """Case "Conv2d(padding_mode='reflect')"."""
    return "Opacus' rule would pad with zeros; mode 'functorch' pads right" if pads_unlike_zeros(layer) else None


def _adds_equal_tokens_once(layer: nn.Module) -> str | None:
    """Case "EmbeddingBag offsets"."""
    return "a token that is in a bag twice would count once" if isinstance(layer, nn.EmbeddingBag) else None


def _refuse_strides(where: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Case "input: channels_last": Opacus' `unfold2d` takes it that the last two axes lie in order."""
    if not inputs[0][:1, :1].is_contiguous():
        raise Unsupported(
            f"{where}: Opacus' rule would misread an input of strides {list(inputs[0].stride())} (channels_last?); "
            "give it a contiguous one, or use mode 'functorch'"
        )


def _refuse_hooked_twice(model: nn.Module, hooked: Sequence[Hooked]) -> None:
    """Case "tied: a module under two parents": Opacus' walk meets it twice."""
    found = [id(h.module) for h in hooked]
    for path, module in model.named_modules():
        if found.count(id(module)) > 1:
            raise Unsupported(f"{describe(path, module)} has several parents; Opacus would hook it once for each")


HOOK_RULES: tuple[Wrong, ...] = (_pads_with_zeros, trains_padding, _adds_equal_tokens_once)
"""What goes wrong where Opacus' hand-written rules are used."""
