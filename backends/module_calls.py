"""What a library that watches modules, or the functions they call, would get wrong of a model.

Opacus and BackPACK combine what goes into a layer with the gradient of what comes out. That is right only if each
trainable parameter is used where the library looks, and if row i of what goes in and out is sample i. A few tiny
passes of a plain copy (`probe.py`) show whether it is so; `watcher` turns a "no" into a refusal with the place, and
`collect` takes the results off the parameters, and holds the sum of gradients against the batch gradient.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from backends.base import Named, Unsupported, first_line, guarded, own_copy, rows_of
from backends.batch import Batch, signature, size
from backends.probe import Hooked, Use, some, uses
from backends.rows import RowsOf, batch_first
from backends.running import kept_random_state
from backends.shortage import lack_of_memory
from backends.verify import OFF

Rule = Callable[[str, Use], str | None]
"""(library, use) -> why the library would be wrong there, or None; the cases that prove it stand beside it."""


def watcher(
    library: str,
    model: nn.Module,
    hooked: Callable[[nn.Module], Iterable[Hooked]] = lambda model: (),
    *,
    functions: RowsOf | None = None,
    repeats: Callable[[nn.Module], bool] = lambda module: False,
    shares: bool = True,
) -> Callable[[Batch], AbstractContextManager[bool]]:
    """Build the check that refuses a model which a library would get wrong.

    Args:
        library: The library's name, for the reason.
        model: The caller's model; a copy of it is run, without the library.
        hooked: The modules that the library hooks in a model.
        functions: Where the library takes the samples to be in functions called outside of hooked modules; None if it
            does not see those.
        repeats: Whether it adds up the uses of a parameter by several calls of such a module.
        shares: Whether it knows a parameter of several modules for one.

    Returns:
        A function of the inputs that raises `Unsupported` with the module path, or the parameter's name, and the
        reason. It looks once at each form of inputs, since control flow may depend on shapes. It is a context
        whose value says whether this form is new; it stays new until a block has ended well.
    """
    if not guarded():
        return lambda inputs: nullcontext(False)
    plain = own_copy(model)
    paths = {id(module): path for path, module in plain.named_modules()}
    by_path = {paths[id(h.module)]: h for h in hooked(plain)}
    rules: list[Rule] = [*([] if functions else [_outside]), _differentiated, _replaced, _altered, _updated, _unseen]
    rules += [_miscounted, _strayed]
    seen = set()

    @contextmanager
    def watching(inputs: Batch) -> Iterator[bool]:
        form = (signature(inputs), size(inputs) > 1)  # one sample alone has no order
        new = form not in seen
        if new:
            # one state for all passes: a permutation drawn at random is then another one in each
            with kept_random_state(plain):
                one, *more = some(inputs)
                check(one)
                for few in more:
                    with _only_of_order(library, few is more[0]):
                        check(few)
        yield new
        seen.add(form)

    def check(few: Batch) -> None:
        for sample in range(size(few)):
            found = uses(plain, by_path, few, sample, functions or batch_first)
            for reason in (reason for use in found for rule in rules if (reason := rule(library, use))):
                raise Unsupported(reason)
            _refuse_repeated(library, found, repeats)
            if not shares:
                _refuse_shared(library, found)

    return watching


@contextmanager
def _only_of_order(library: str, in_order: bool) -> Iterator[None]:
    """Let a failure of the model be: a model that cannot take its samples backwards does not sort them.

    Raises:
        Unsupported: It cannot take the samples in order either, though it takes one.
    """
    try:
        yield
    except Unsupported:
        raise
    except Exception as error:
        if lack_of_memory(error):
            raise
        if in_order:
            raise Unsupported(f"{library} cannot be watched: `model` on a few samples: {first_line(error)}") from error


def _outside(library: str, use: Use) -> str | None:
    """Cases "functional: F.linear after the module", "functional: a penalty on the weight"."""
    if use.hooked is not None:
        return None
    return (
        f"{use.by}: a use outside the call of a module that owns it; "
        f"{library} watches module calls and would miss that use"
    )


def _differentiated(library: str, use: Use) -> str | None:
    """Cases "mode: a double backward", "mode: a gradient in the forward"."""
    if not use.differentiated:
        return None
    return f"{use.by}: the forward pass takes a gradient through it; {library} would take that for the loss's"


def _replaced(library: str, use: Use) -> str | None:
    """Case "functional: functional_call with other weights"."""
    if "weights" not in use.altered:
        return None
    return f"{use.by} is called with other weights than its own; {library} would take them for its own"


def _altered(library: str, use: Use) -> str | None:
    """Cases "module: a hook triples the output", "module: a hook triples the input" (where it is run anew)."""
    if use.hooked is None or ("input" if use.hooked.reruns else "output") not in use.altered:
        return None
    if use.hooked.reruns:
        return f"{use.by} has a hook that changes its input; {library} would run that hook twice"
    return f"{use.by} has a hook that changes its output; {library} would not see that"


def _updated(library: str, use: Use) -> str | None:
    """Spectral norm in training mode, say: it would go a step further each time."""
    if use.hooked is None or not use.hooked.reruns or "buffers" not in use.altered:
        return None
    return f"{use.by} changes its buffers when it is run; {library} would run it twice"


def _unseen(library: str, use: Use) -> str | None:
    """Cases "module: an optional second tensor", "module: an optional tensor by keyword"."""
    if use.hooked is not None and use.hooked.several:
        return None
    if use.keywords:
        return f"{use.by} is called with a tensor as keyword; {library} sees positional inputs only"
    if use.hooked is not None and use.hooked.reruns and (use.tensors_in, use.tensors_out) != (1, 1):
        return (
            f"{use.by} takes {use.tensors_in} tensor(s) and returns {use.tensors_out}; "
            f"{library} runs such a module anew, on one and for one"
        )
    return None


def _miscounted(library: str, use: Use) -> str | None:
    """Cases "Linear sequence-first, T = N", "Linear called with batches of N and of 1"."""
    if set(use.counts) <= {use.samples}:
        return None
    return (
        f"{use.by}: for {use.samples} sample(s) its inputs and output have batch axes of {list(use.counts)}; "
        f"{library} takes every row to be a sample"
    )


def _strayed(library: str, use: Use) -> str | None:
    """Cases "Linear samples reordered in the model", "batch: samples sorted in the model"."""
    if not use.strays:
        return None
    return (
        f"{use.by}: row {use.strays[0]} of its output belongs to sample {use.sample}; "
        f"{library} takes row i to be sample i, but the model reorders or mixes them"
    )


def _refuse_repeated(library: str, found: Iterable[Use], repeats: Callable[[nn.Module], bool]) -> None:
    """Cases "tied: one weight in two modules", "tied: one call detached"."""
    users: dict[str, list[Use]] = defaultdict(list)
    for use in found:
        for name in use.parameters:
            users[name].append(use)
    for name, by in users.items():
        if len(by) > 1 and any(use.hooked and not repeats(use.hooked.module) for use in by):
            raise Unsupported(
                f"parameter `{name}` is used by {len(by)} module calls ({', '.join(use.by for use in by)}); "
                f"{library} would keep only one of the uses"
            )


def _refuse_shared(library: str, found: Iterable[Use]) -> None:
    """Case "tied: one weight in two modules"."""
    users: dict[str, dict[int, str]] = defaultdict(dict)
    for use in found:
        for name in use.parameters if use.hooked else ():
            users[name][id(use.hooked)] = use.by
    for name, by in users.items():
        if len(by) > 1:
            raise Unsupported(
                f"parameter `{name}` is used by {len(by)} modules ({', '.join(by.values())}); "
                f"{library} would take it for {len(by)} parameters"
            )


def pads_unlike_zeros(layer: nn.Module) -> bool:
    """Return whether a layer's weight meets padding that is not zeros: case "Conv2d(padding_mode='reflect')"."""
    weight, padding = getattr(layer, "weight", None), getattr(layer, "padding", 0)
    trained = isinstance(weight, Tensor) and weight.requires_grad
    if padding == "same":
        padding = tuple(width - 1 for width in layer.kernel_size)  # type: ignore[union-attr]  # a convolution's
    padded = isinstance(padding, tuple) and any(padding)
    return trained and padded and getattr(layer, "padding_mode", "zeros") != "zeros"


ROUNDINGS = 64
"""Of Σ_i ‖g_i‖ over all parameters, how far besides: a bias before InstanceNorm has no gradient but for rounding."""


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """Silence autograd's warning that a hooked module's inputs need no gradient: the libraries do not need it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


Shape = Callable[[int, nn.Parameter], tuple[int, ...]]
"""(N, parameter) -> the shape of what a library leaves on it."""


def per_sample(samples: int, parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a parameter's per-sample gradients."""
    return (samples, *parameter.shape)


def collect(
    library: str,
    parameters: Mapping[str, nn.Parameter],
    attribute: str,
    samples: int,
    *,
    shape: Shape = per_sample,
    verify: bool = False,
    totals: Named | None = None,
) -> Named:
    """Take what a library left on the parameters off them, after `backward()`: per-sample gradients, or their like.

    Args:
        library: The library's name, for the reason.
        parameters: The parameters, by name.
        attribute: Where the library left its result.
        samples: N.
        shape: The result's shape.
        verify: Check that they sum to the batch gradient.
        totals: The batch gradient, where the library's `backward()` does not leave it in `.grad`.

    Returns:
        {name: result}; zeros where the loss does not depend on the parameter.

    Raises:
        Unsupported: The library left no result, or a wrong one.
    """
    result, gaps, sizes = {}, dict[str, Tensor](), dict[str, Tensor]()
    for name, p in parameters.items():
        found = getattr(p, attribute, None)
        if found is None and p.grad is None:
            found = p.new_zeros(shape(samples, p))
        if not isinstance(found, Tensor):
            raise Unsupported(f"parameter `{name}`: {library} computes no per-sample gradient for it here")
        if guarded() and found.shape != shape(samples, p):
            # case "AdaptiveLogSoftmaxWithLoss", where it depends on the targets how many rows a layer sees
            shapes = f"shape {list(found.shape)}, not {list(shape(samples, p))}"
            raise Unsupported(f"parameter `{name}`: {library}'s per-sample gradient has {shapes}")
        total = p.grad if totals is None else totals[name]
        if verify:
            gaps[name], sizes[name] = _gap(found, torch.zeros_like(p) if total is None else total)
        vars(p).pop(attribute, None)
        p.grad = None
        result[name] = found.detach()
    whole = sum(float(size) for size in sizes.values())
    for name, gap in gaps.items():  # nonfinite gradients are not this check's business
        rounding = min(OFF, ROUNDINGS * torch.finfo(result[name].dtype).eps) * whole
        if gap > OFF * sizes[name] and gap > rounding:
            raise Unsupported(f"parameter `{name}`: {library}'s per-sample gradients do not sum to the batch gradient")
    return result


def _gap(grads: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far Σ_i g_i is from the batch gradient, and Σ_i ‖g_i‖, which that is to be held against."""
    wide = torch.promote_types(grads.dtype, torch.float32)
    scale = torch.linalg.vector_norm(rows_of(grads), dim=1, dtype=wide).sum()
    return torch.linalg.vector_norm(grads.sum(0) - total, dtype=wide), scale
