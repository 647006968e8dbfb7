"""The cases of one layer of torch.nn: made of its options, one at a time, and of the ways to call it."""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeAlias, get_overloads

from torch import nn

from testbed.conformance.case import Case, Layout, Setup, case
from testbed.conformance.uses import call

Options: TypeAlias = Mapping[str, object]
"""Constructor arguments by name."""


def each(**options: tuple[object, ...]) -> list[Options]:
    """Return the options one at a time, each with each of its values."""
    return [{option: value} for option, values in options.items() for value in values]


def ranks(*shapes: tuple[int, ...]) -> dict[str, Layout]:
    """Return the plain calls on samples of these shapes, by words."""
    return {f"input {len(shape) + 1}-D": Layout(call, shape) for shape in shapes}


def _text(value: object) -> str:
    """Return a value as it stands in a case's name; functions and modules have no stable repr."""
    value = value.func if isinstance(value, partial) else value
    return getattr(value, "__name__", None) or repr(value)


def _make(layer: str, arguments: Options, layout: Layout) -> Setup:
    made = {name: a() if isinstance(a, partial) else a for name, a in arguments.items()}
    with warnings.catch_warnings():  # nested tensors are a fast path of inference, which no gradient takes
        warnings.filterwarnings("ignore", "enable_nested_tensor is True")
        return layout.setup(getattr(nn, layer)(**made))


def family(
    layer: str, base: Options, layout: Layout, options: list[Options], layouts: Mapping[str, Layout] | None = None
) -> Iterator[Case]:
    """Yield the cases of one layer; none of a layer or option that the installed torch lacks.

    Args:
        layer: Its name in torch.nn.
        base: Arguments of every case; a `partial` is called anew for each model.
        layout: How the model calls it, if nothing else is said.
        options: What to try in place of the base; the first counts as tried, others let it matter.
        layouts: Other ways to call it, by words, or by the option that asks for it.
    """
    known = options_of(getattr(nn, layer)) if hasattr(nn, layer) else {}
    tried = {", ".join(f"{o}={_text(v)}" for o, v in these.items()): these for these in options}
    rows = {"": layout} | {said: replace(layout, options=these, reason="") for said, these in tried.items()}
    for said, how in (rows | dict(layouts or {})).items() if known else []:
        if how.options.keys() <= known.keys():
            name = f"{layer}({said})" if said.partition("=")[0] in known else f"{layer} {said}".strip()
            arguments = {**base, **how.options}
            # Dropout is off in eval mode, and only there does the model repeat itself.
            how = replace(how, training=how.training and not arguments.get("dropout"))
            yield case(name, layer, said, partial(_make, layer, arguments, how), how.reason)


def options_of(layer: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """Return a constructor's arguments by name; where it is overloaded, those of all overloads."""
    constructors = get_overloads(layer.__init__) or [layer.__init__]
    named = [p for c in constructors for p in list(inspect.signature(c).parameters.values())[1:]]
    return {p.name: p for p in named if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
