"""What is kept of both passes of a model: the ops that rules cover are tapped, and their pairs made into gradients.

Ops are watched, not modules: a weight may be tied, raw or used functionally, and each of its uses adds its own term.
How the passes are run is in `passes.py`.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backends import precision
from backends.base import Named
from backends.ops.answers import HEARD, Asked, Told
from backends.ops.elementwise import REPEATS, is_repeated
from backends.ops.made import Clean, Made, Through, made_of
from backends.ops.persample import PerSample
from backends.ops.places import ALONE, GUESSES, SHARED, WITHOUT, Elsewhere, Guess, Layout, Place, Sizes, likely
from backends.ops.rules import OVER_THE_BATCH, ROLES, RULES, UNDER_VMAP, Bound, Op, Rule
from backends.ops.several import added
from backends.ops.taps import BatchTap, Site, Tap, Uncovered
from backends.ops.vmapped import Call, Copies, Plan, samples_first

Each: TypeAlias = Callable[[str, PerSample], Any]
"""(a parameter's name, its per-sample gradients) -> what is wanted of them."""


@dataclass
class Recorder(TorchFunctionMode):
    """Taps the ops that rules cover, and puts other ops in the place of some.

    Attributes:
        names: The parameters' names, by the identity of what stands for them.
        values: The parameters themselves, without gradient.
        token: A zero of each sample's own, which has a gradient.
        with_rules: Whether there are rules at all.
        samples: N in a pass over the batch; None under vmap.
        known: What is known of a pass over the batch; None where it is to be found.
        guess: What is guessed where it is to be found.
        each: What is wanted of a parameter's gradients: had as soon as its last use, if that is known, is through.
        found: Per-sample gradients by the uses of each parameter, until then.
        wanted: What was wanted.
        places: The samples' place at each op so far that has a rule and a parameter.
        at: The parameters at each tap so far.
        copies: Parameters at ops under vmap, of which each sample has one entry on an axis.
        seen: Where it is wanted, what went into each tap [N, ...], and then what came back, the last one first.
        uses: How many uses of each parameter are through.
        asked: What the model asks for, and is answered.
        made: In a pass over the batch, what is made of parameters alone, by names like theirs.
        is_made: Whether it is, each time that this is asked of a tensor that might be.
        sizes: Of the tensors that go into each op that has a rule, used or not, in a pass that is to be known.
        clean: In such a pass, what may be made of parameters alone.
        vmapped: Of the ops with parameters, other tensors and no rule, how they run under vmap by themselves, if so.
    """

    names: dict[int, str]
    values: Named
    token: Tensor
    with_rules: bool = True
    samples: int | None = None
    known: Layout | None = None
    guess: Guess = GUESSES[0]
    each: Each = lambda name, g: g
    found: dict[str, list[PerSample]] = field(default_factory=dict)
    wanted: dict[str, Any] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    at: list[tuple[str, ...]] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    seen: list[Tensor] | None = None
    uses: Counter[str] = field(default_factory=Counter)
    asked: Asked | Told | None = None
    made: dict[str, Made] = field(default_factory=dict)
    is_made: list[bool] = field(default_factory=list)
    sizes: list[Sizes] = field(default_factory=list)
    clean: Clean | None = None
    vmapped: list[Plan] = field(default_factory=list)
    forward_is_over: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.found = {name: [] for name in self.values}
        self._rewrites = UNDER_VMAP if self.samples is None else OVER_THE_BATCH
        self._rules = RULES if self.with_rules else {}
        known = self.known.vmapped if self.known else ()
        self._perhaps_vmapped = {plan.func for plan in known} if any(plan.out for plan in known) else set()

    def show(self, t: Tensor) -> None:
        """Keep what samples show at a tap, where that is wanted."""
        if self.seen is not None:
            self.seen.append(t.detach().clone())

    def take(self, name: str, piece: PerSample) -> None:
        """Take the gradients by one use of a parameter."""
        if name not in self.found:
            raise Uncovered  # its last use is not what it was
        self.uses[name] += 1
        if self.known and self.uses[name] == self.known.uses.get(name):
            self.found[name].append(piece)
            self._finish(name, piece.samples)
        else:
            self.found[name].append(piece.compact())

    @torch.no_grad()
    def all_wanted(self, samples: int) -> dict[str, Any]:
        """Return what is wanted of each parameter's gradients; both passes are over."""
        with precision.without_autocast(self.token.device):
            for name, made in self.made.items():
                if pieces := self.found.pop(name):
                    later = added(pieces, samples, self.values[name])
                    for parameter, p in made.of.items():
                        self.take(parameter, Through(later, made.tensor, p))
            for name in list(self.found):
                self._finish(name, samples)
        return {name: self.wanted[name] for name in self.values if name not in self.made}

    def _finish(self, name: str, samples: int) -> None:
        self.wanted[name] = self.each(name, added(self.found.pop(name), samples, self.values[name]))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        run = partial(self._run, func, args, kwargs or {})
        return run() if self.clean is None else self.clean.made(func, args, kwargs, run)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401  as `__torch_function__` is given them
        if func in self._rewrites and (y := self._rewritten(func, args, kwargs)) is not NotImplemented:
            return y
        if func in REPEATS and self.samples and self._rules and (name := self._name(args[0])):
            repeated = func(self.values[name], *args[1:], **kwargs)
            if is_repeated(self.values[name], repeated):
                return self._run(torch.add, (repeated.new_zeros(repeated.shape), args[0]), {})
        if func in self._rules and self.samples is not None and self.known is None:
            self.sizes.append(_sizes(args, kwargs))
        if func in self._rules and (bound := self._bound(self._rules[func], args, kwargs)):
            found = {role: self._name(bound.arguments[role]) for role in ROLES if role in bound.arguments}
            names = {role: name for role, name in found.items() if name is not None}
            if names:
                bound.arguments.update({role: self.values[name] for role, name in names.items()})
                if self._rules[func].covers(bound.arguments):
                    elsewhere = self._elsewhere(bound.arguments["input"], (*args, *kwargs.values()))
                    y = self._tapped(func, bound, names, elsewhere)
                    if y is not None:
                        return y
        if self._may_be_vmapped(func) and (y := self._vmapped(Call.of(func, args, kwargs))) is not None:
            return y
        if func in HEARD and self.asked is not None:
            return self.asked(func, args, kwargs)
        return func(*args, **kwargs)

    def _may_be_vmapped(self, func: Op) -> bool:
        if self.known is not None:
            return func in self._perhaps_vmapped
        return bool(self._rules) and self.samples is not None and self.samples > 1

    def _vmapped(self, call: Call) -> Tensor | None:
        """Return what an op without a rule returns, by vmap; None where it is not of parameters and samples."""
        n, tensors = self.samples or 0, call.tensors()
        of = {k: found for k, t in tensors.items() if (found := self._of(t))}
        if not of or len(of) == len(tensors):
            return None
        plan = self._planned(call, n, tuple(of))
        if plan is None or plan.out is None:
            return None
        copies = dict[int, Tensor]()
        for k in of:
            name = self.names.get(id(tensors[k])) or self._register(tensors[k], of[k])
            copies[k] = Copies.apply(self.token, self.values[name], self, name)
        names = tuple(chain.from_iterable(of.values()))
        if plan.one_row():
            self.copies += names
        else:
            self.at.append(names)
        y = call.run(plan, copies, n)
        if self.seen is not None:
            for k, place in plan.places:
                self.show(samples_first(tensors[k], n, place))
            # where what goes in is 0, as of a branch that starts from there, only this shows whose it is
            y.register_hook(partial(self._show_first, n=n, place=plan.out))
        return y

    def _show_first(self, g: Tensor, n: int, place: Place) -> None:
        self.show(samples_first(g, n, place))

    def _planned(self, call: Call, n: int, parameters: tuple[int, ...]) -> Plan | None:
        """Return how the op is run: what is known, or what is found; None where samples' places are not known yet."""
        if self.known is not None:
            plan = next(iter(self.known.vmapped[len(self.vmapped) :][:1]), None)
            if plan is None or (plan.func, plan.parameters) != (call.func, parameters):
                raise Uncovered
        else:
            tensors = call.tensors()
            if call.func not in self._rules:
                self.sizes.append([t.shape for t in tensors.values()])
            plan = call.planned(
                {k: self._values_of(tensors[k]) for k in parameters}, n, self.guess, len(self.sizes) - 1
            )
        if plan is not None:
            self.vmapped.append(plan)
        return plan

    def _values_of(self, t: Tensor) -> Tensor:
        return self.values.get(self.names.get(id(t), ""), t).detach()

    def _of(self, t: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """Return the parameters that a tensor is, or is made of, by name."""
        name = self.names.get(id(t))
        if name is not None:
            return dict(self.made[name].of) if name in self.made else {name: t}
        known = isinstance(t, Tensor) and t.grad_fn is not None and (self.clean is None or t in self.clean)
        return made_of(t, self.names, self.values) if known else {}

    def _name(self, t: Any) -> str | None:  # noqa: ANN401
        """Return the name of a parameter, or of what is made of parameters alone."""
        name = self.names.get(id(t))
        if name is not None or not self.samples or self.samples == 1 or not isinstance(t, Tensor) or t.grad_fn is None:
            return None if name and t.is_complex() else name
        of: dict[str, Tensor] = {}
        clean = self.clean is None or t in self.clean
        if clean and (self.known is None or any(self.known.made[len(self.is_made) :][:1])):
            of = made_of(t, self.names, self.values) if t.is_floating_point() else {}
        self.is_made.append(bool(of))
        if not of:
            return None
        return self._register(t, of)

    def _register(self, t: Tensor, of: dict[str, Tensor]) -> str:
        """Return the name of what is made of parameters, from now on."""
        if not self.made:
            self.names, self.values = dict(self.names), dict(self.values)  # they are shared by all passes
        name = f"made {len(self.made)}"  # no parameter has a name with a space
        self.made[name] = Made(t, of)
        self.names[id(t)], self.values[name], self.found[name] = name, t.detach(), []
        self.show(t.expand(self.samples or 1, 1, *t.shape))  # a look finds out whether another sample changes it
        return name

    def _bound(self, rule: Rule, args: Any, kwargs: Any) -> Bound | None:  # noqa: ANN401
        if rule.commutes:  # most have no parameter, and none of these may take long
            which = [self._name(a) is not None for a in args]
            if sum(which) != 1:
                return None
            args = args if which[-1] else rule.commutes(args)
        return rule.bind(args, kwargs)

    def _rewritten(self, func: Op, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        rewrite = self._rewrites[func]
        with self if rewrite.watched else nullcontext():
            return rewrite.function(*args, **kwargs)

    def _elsewhere(self, x: Tensor, args: Sequence[Any]) -> Elsewhere:
        """Return another number of samples, and the size of an op's input for it, if that is known."""
        if self.known is not None or self.samples is None:
            return 0, None
        n, sizes = self.guess.elsewhere(self.samples, len(self.sizes) - 1)
        tensors = [a for a in args if isinstance(a, Tensor)]
        return n, next((size for t, size in zip(tensors, sizes, strict=False) if t is x and len(size) == x.dim()), None)

    def _tapped(self, func: Op, bound: Bound, names: dict[str, str], elsewhere: Elsewhere) -> Tensor | None:
        """Return what an op returns, tapped; None where samples are not in it."""
        x = bound.arguments["input"]
        if self.known is not None and self.known.places[len(self.places) :][:1] == [WITHOUT]:
            self.places.append(WITHOUT)
            return None
        if self._rules[func].folds and self.samples is not None and x.dim() > 2:
            x = bound.arguments["input"] = x.contiguous()
        y = bound.call(func)
        if self.samples is not None:
            place = self._place(x, y, self.samples, elsewhere)
            if place == WITHOUT:
                return None
            of = [self.made[name].of if name in self.made else [name] for name in names.values()]
            self.at.append(tuple(chain.from_iterable(of)))
            if place == SHARED:
                x, y, place = (*(t.expand(self.samples, *t.shape[1:]) for t in (x, y)), Place(0))
            self.show(place.samples_first(x))
            tapped_y: Tensor = BatchTap.apply(y, self.token, x, Site(self, RULES[func], bound.arguments, names, place))
            return tapped_y
        others = [t for k, t in bound.arguments.items() if isinstance(t, Tensor) and k not in ("input", *ROLES)]
        site = Site(self, RULES[func], bound.arguments, names, None)
        tapped: Tensor = Tap.apply(y, self.token, x, site, *others)
        return tapped

    def _place(self, x: Tensor, y: Tensor, n: int, elsewhere: Elsewhere) -> Place:
        """Return where the samples are in what goes into an op and comes out of it: what is known, or the first fit."""
        if n == 1:
            return ALONE
        layout = self.known
        known = likely(x, n, self.guess, elsewhere) if layout is None else layout.places[len(self.places) :][:1]
        for place in known:
            if place.fits(x, y, n):
                self.places.append(place)
                return place
        raise Uncovered


def _sizes(args: Any, kwargs: Any) -> Sizes:  # noqa: ANN401  as `__torch_function__` is given them
    return [t.shape for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
