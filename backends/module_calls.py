"""What a library that watches modules can see of a model, and what it would miss.

Opacus and BackPACK hook modules: they combine a module's input with the gradient of its output. That is right only if
each trainable parameter is used inside a hooked module, with the batch on the first axis of what goes in and out.
Two forward passes (one sample, two samples) show whether it is so; `watcher` turns a "no" into a reason, and `collect`
takes the results off the parameters and holds their sum against the batch gradient.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from backends.base import Named, Unsupported, describe, kept_buffers, kept_random_state, own_copy, trainable
from backends.batch import Batch, call, signature, take


@dataclass(frozen=True)
class Hooked:
    """A module that a library hooks.

    Attributes:
        module: The module.
        deep: Its rule covers the parameters of its children too.
        single: Its rule takes one tensor in and one tensor out.
    """

    module: nn.Module
    deep: bool = False
    single: bool = False

    def covered(self) -> set[int]:
        """Return the identities of the parameters that the rule covers."""
        return {id(p) for p in self.module.parameters(recurse=self.deep)}


@dataclass(frozen=True)
class Use:
    """A use of parameters: by the call of a hooked module, or by a function outside of one (`path` is None)."""

    by: str
    parameters: tuple[str, ...]
    path: str | None
    tensors_in: int
    tensors_out: int
    first_axes: tuple[int, ...]
    keywords: bool = False


@dataclass
class _Watch(TorchFunctionMode):
    """Records the calls of hooked modules, and differentiable uses of parameters outside of them."""

    hooked: Mapping[str, Hooked]
    names: Mapping[int, str]
    uses: list[Use] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.covered = {path: h.covered() for path, h in self.hooked.items()}
        self.handles = [
            handle
            for path, h in self.hooked.items()
            for handle in (
                h.module.register_forward_pre_hook(lambda *_, path=path: self.inside.append(path)),
                h.module.register_forward_hook(self.left, with_kwargs=True, always_call=True),
            )
        ]

    def left(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ANN401  hooks see anything
        path = self.inside.pop()
        parameters = tuple(name for p, name in self.names.items() if p in self.covered[path])
        by = describe(path, module)
        self.uses.append(_use(by, parameters, path, args, output, keywords=bool(_tensors(kwargs))))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        if any(t.requires_grad for t in _tensors(result)):  # not a size, a dtype, something detached
            inside = set().union(*(self.covered[path] for path in self.inside))
            found = {id(t): t for t in _tensors((args, kwargs)) if id(t) in self.names}
            if missed := tuple(self.names[p] for p in found if p not in inside):
                others = [t for t in _tensors((args, kwargs)) if id(t) not in found]
                by = f"{resolve_name(func) or func} with parameter `{missed[0]}`"
                self.uses.append(_use(by, missed, None, others, result))
        return result


def _tensors(tree: Any) -> list[Tensor]:  # noqa: ANN401  what hooks and functions are called with
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _use(by: str, parameters: tuple[str, ...], path: str | None, args: Any, output: Any, keywords: bool = False) -> Use:  # noqa: ANN401
    ins, outs = _tensors(args), _tensors(output)
    first_axes = tuple(t.shape[0] if t.dim() else 0 for t in ins + outs[:1])  # an LSTM's states have layers first
    return Use(by, parameters, path, len(ins), len(outs), first_axes, keywords)


def _uses(model: nn.Module, hooked: Mapping[str, Hooked], inputs: Batch) -> list[Use]:
    watch = _Watch(hooked, {id(p): name for name, p in trainable(model).items()})
    try:
        with kept_random_state(model), kept_buffers(model), torch.enable_grad(), watch:
            call(model, inputs)
    finally:
        for handle in watch.handles:
            handle.remove()
    return watch.uses


def watcher(
    library: str,
    model: nn.Module,
    hooked: Callable[[nn.Module], Iterable[Hooked]],
    *,
    outside: bool = False,
    repeats: bool = False,
) -> Callable[[Batch], AbstractContextManager[bool]]:
    """Build the check that refuses a model which a module-watching library would get wrong.

    Args:
        library: The library's name, for the reason.
        model: The caller's model; a copy of it is run, without the library.
        hooked: The modules that the library hooks in a model.
        outside: Whether it also sees parameters used outside the call of a hooked module.
        repeats: Whether it adds up the uses of a parameter by several calls.

    Returns:
        A function of the inputs that raises `Unsupported` with the module path, or the parameter's name, and the
        reason. It looks once at each form of inputs, since control flow may depend on shapes. It is a context
        whose value says whether this form is new; it stays new until a block has ended well.
    """
    plain = own_copy(model)
    paths = {id(module): path for path, module in plain.named_modules()}
    by_path = {paths[id(h.module)]: h for h in hooked(plain)}
    seen = set()

    @contextmanager
    def watching(inputs: Batch) -> Iterator[bool]:
        new = signature(inputs) not in seen
        if new:
            check(inputs)
        yield new
        seen.add(signature(inputs))

    def check(inputs: Batch) -> None:
        first = torch.zeros(1, dtype=torch.long)
        users: dict[str, list[str]] = defaultdict(list)
        once = _uses(plain, by_path, take(inputs, first))
        twice = _uses(plain, by_path, take(inputs, first.repeat(2)))
        for one, two in zip(once, twice, strict=True):
            refuse_use(one, two)
            for name in one.parameters:
                users[name].append(one.by)
        for name, by in users.items():
            if len(by) > 1 and not repeats:
                raise Unsupported(
                    f"parameter `{name}` is used by {len(by)} module calls ({', '.join(by)}); "
                    f"{library} would keep only one of the uses"
                )

    def refuse_use(one: Use, two: Use) -> None:
        if one.path is None and not outside:
            raise Unsupported(
                f"{one.by}: a use outside the call of a module that owns it; "
                f"{library} watches module calls and would miss that use"
            )
        if one.keywords:
            raise Unsupported(f"{one.by} is called with a tensor as keyword; {library} sees positional inputs only")
        if one.path is not None and by_path[one.path].single and (one.tensors_in, one.tensors_out) != (1, 1):
            raise Unsupported(
                f"{one.by} takes {one.tensors_in} tensor(s) and returns {one.tensors_out}; "
                f"a general rule of {library}'s takes one and returns one"
            )
        if set(one.first_axes) != {1} or set(two.first_axes) != {2}:
            raise Unsupported(
                f"{one.by}: for 1 and 2 samples its inputs and output have first axes {list(one.first_axes)} and "
                f"{list(two.first_axes)}; {library} takes the first axis to be the batch"
            )

    return watching


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """Silence autograd's warning that a hooked module's inputs need no gradient: the libraries do not need it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield


def collect(library: str, parameters: Mapping[str, nn.Parameter], attribute: str, *, verify: bool) -> Named:
    """Take per-sample gradients off the parameters, after `backward()`.

    Args:
        library: The library's name, for the reason.
        parameters: The parameters, by name.
        attribute: Where the library left the per-sample gradients.
        verify: Check that they sum to the batch gradient, where `backward()` has left that in `.grad`.

    Returns:
        {name: [N, *shape]}; zeros where the loss does not depend on the parameter.

    Raises:
        Unsupported: The library left no per-sample gradient, or a wrong one.
    """
    found = {name: getattr(p, attribute, None) for name, p in parameters.items()}
    lengths = [g.shape[0] for g in found.values() if isinstance(g, Tensor)]
    result = {}
    for name, p in parameters.items():
        grads = found[name]
        if grads is None and (p.grad is None or not p.grad.any()) and lengths:
            grads = p.new_zeros(lengths[0], *p.shape)
        if not isinstance(grads, Tensor) or grads.shape[1:] != p.shape:
            raise Unsupported(f"parameter `{name}`: {library} computes no per-sample gradient for it here")
        if verify and p.grad is not None and not _sums_to(grads, p.grad):
            raise Unsupported(f"parameter `{name}`: {library}'s per-sample gradients do not sum to the batch gradient")
        if hasattr(p, attribute):
            delattr(p, attribute)
        p.grad = None
        result[name] = grads.detach()
    return result


def _sums_to(grads: Tensor, total: Tensor) -> bool:
    """Return whether Σ_i g_i is the batch gradient, up to 1 % of Σ_i ‖g_i‖ (rounding is far below, lost uses above)."""
    wide = torch.promote_types(grads.dtype, torch.float32)
    scale = torch.linalg.vector_norm(grads.flatten(1), dim=1, dtype=wide).sum()
    gap = torch.linalg.vector_norm(grads.sum(0) - total, dtype=wide)
    return not bool(gap > 0.01 * scale)  # nonfinite gradients are not this check's business
