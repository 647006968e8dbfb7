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
from backends.ops.made import Clean, Made, Through, made_of
from backends.ops.persample import PerSample
from backends.ops.places import ALONE, GUESSES, SHARED, WITHOUT, Elsewhere, Guess, Layout, Place, Sizes, likely
from backends.ops.rules import OVER_THE_BATCH, ROLES, RULES, UNDER_VMAP, Bound, Op, Rule
from backends.ops.several import added
from backends.ops.taps import BatchTap, Site, Tap, Uncovered

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
        copies: Those that are there as [N, ...] and have a gradient.
        seen: Where it is wanted, what went into each tap [N, ...], and then what came back, the last one first.
        uses: How many uses of each parameter are through.
        asked: What the model asks for, and is answered.
        made: In a pass over the batch, what is made of parameters alone, by names like theirs.
        is_made: Whether it is, each time that this is asked of a tensor that might be.
        sizes: Of the tensors that go into each op that has a rule, used or not, in a pass that is to be known.
        clean: In such a pass, what may be made of parameters alone.
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
    forward_is_over: bool = False

    def __post_init__(self) -> None:
        super().__init__()
        self.found = {name: [] for name in self.values}
        self._rewrites = UNDER_VMAP if self.samples is None else OVER_THE_BATCH
        self._rules = RULES if self.with_rules else {}

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
        if func in self._rewrites:
            return self._rewritten(func, args, kwargs)
        if func in HEARD and self.asked is not None:
            return self.asked(func, args, kwargs)
        if func in self._rules and self.samples is not None and self.known is None:
            self.sizes.append([t.shape for t in (*args, *kwargs.values()) if isinstance(t, Tensor)])
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
        return func(*args, **kwargs)

    def _name(self, t: Any) -> str | None:  # noqa: ANN401
        """Return the name of a parameter, or of what is made of parameters alone."""
        name = self.names.get(id(t))
        if name is not None or not self.samples or self.samples == 1 or not isinstance(t, Tensor) or t.grad_fn is None:
            return name
        of: dict[str, Tensor] = {}
        clean = self.clean is None or t in self.clean
        if clean and (self.known is None or any(self.known.made[len(self.is_made) :][:1])):
            of = made_of(t, self.names, self.values) if t.is_floating_point() else {}
        self.is_made.append(bool(of))
        if not of:
            return None
        if not self.made:
            self.names, self.values = dict(self.names), dict(self.values)  # they are shared by all passes
        name = f"made {len(self.made)}"  # no parameter has a name with a space
        self.made[name] = Made(t, of)
        self.names[id(t)], self.values[name], self.found[name] = name, t.detach(), []
        self.show(t.expand(self.samples, 1, *t.shape))  # a look finds out whether another sample changes it
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
            result = rewrite.function(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result

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
