"""What is kept of both passes of a model: the ops that rules cover are tapped, and their pairs made into gradients.

Ops are watched, not modules: a weight may be tied, raw or used functionally, and each of its uses adds its own term.
How the passes are run is in `passes.py`.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from backends import precision
from backends.base import Named
from backends.ops.answers import HEARD, Asked, Told
from backends.ops.made import Made, Through
from backends.ops.persample import PerSample
from backends.ops.places import ALONE, SHARED, Layout, Place, likely
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
        apart: Where several entries on an axis belong to a sample, whether to look for them N apart.
        each: What is wanted of a parameter's gradients: had as soon as its last use, if that is known, is through.
        found: Per-sample gradients by the uses of each parameter, until then.
        wanted: What was wanted.
        places: The samples' place at each tap so far.
        at: The parameters at each tap so far.
        copies: Those that are there as [N, ...] and have a gradient.
        seen: Where it is wanted, what went into each tap [N, ...], and then what came back, the last one first.
        uses: How many uses of each parameter are through.
        asked: What the model asks for, and is answered.
        made: In a pass over the batch, what is made of parameters alone, by names like theirs.
    """

    names: dict[int, str]
    values: Named
    token: Tensor
    with_rules: bool = True
    samples: int | None = None
    known: Layout | None = None
    apart: bool = False
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
        if self.samples is not None and self.samples > 1 and (of := self._parameters(args, kwargs or {})):
            return self._made(func(*args, **(kwargs or {})), of)
        if func in self._rewrites:
            return self._rewritten(func, args, kwargs or {})
        if func in HEARD and self.asked is not None:
            return self.asked(func, args, kwargs)
        if func in self._rules and (bound := self._bound(self._rules[func], args, kwargs or {})):
            names = {role: self.names[p] for role in ROLES if (p := id(bound.arguments.get(role))) in self.names}
            if names:
                bound.arguments.update({role: self.values[name] for role, name in names.items()})
                if self._rules[func].covers(bound.arguments):
                    return self._tapped(func, bound, names)
        return func(*args, **(kwargs or {}))

    def _parameters(self, args: Any, kwargs: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """Return the parameters that an op's tensors are, or are made of; none where one may belong to samples."""
        found: dict[str, Tensor] = {}
        for a in (*args, *kwargs.values()):
            for t in a if isinstance(a, list | tuple) else (a,):
                if isinstance(t, Tensor):
                    name = self.names.get(id(t))
                    if name is None or t.shape != self.values[name].shape:  # which a copy for each sample has not
                        return {}
                    found.update(self.made[name].of if name in self.made else {name: t})
        return found

    def _made(self, result: Any, of: Mapping[str, Tensor]) -> Any:  # noqa: ANN401  whatever an op returns
        if not self.made:
            self.names, self.values = dict(self.names), dict(self.values)  # they are shared by all passes
        for t in result if isinstance(result, list | tuple) else (result,):
            if isinstance(t, Tensor) and t.requires_grad and t.is_floating_point() and id(t) not in self.names:
                name = f"made {len(self.made)}"  # no parameter has a name with a space
                self.made[name] = Made(t, of)
                self.names[id(t)], self.values[name], self.found[name] = name, t.detach(), []
        return result

    def _bound(self, rule: Rule, args: Any, kwargs: Any) -> Bound | None:  # noqa: ANN401
        if rule.commutes:  # elementwise: most have no parameter, and none of these may take long
            which = [id(a) in self.names for a in args]
            if sum(which) != 1:
                return None
            args = args if which[-1] else args[::-1]
        return rule.bind(args, kwargs)

    def _rewritten(self, func: Op, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        rewrite = self._rewrites[func]
        with self if rewrite.watched else nullcontext():
            result = rewrite.function(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result

    def _tapped(self, func: Op, bound: Bound, names: dict[str, str]) -> Tensor:
        x = bound.arguments["input"]
        if self._rules[func].folds and self.samples is not None and x.dim() > 2:
            x = bound.arguments["input"] = x.contiguous()
        y = bound.call(func)
        if self.samples is not None:
            place = self._place(x, y, self.samples)
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

    def _place(self, x: Tensor, y: Tensor, n: int) -> Place:
        """Return where the samples are in what goes into an op and comes out of it: what is known, or the first fit."""
        if n == 1:
            return ALONE
        known = likely(x, n, self.apart) if self.known is None else self.known.places[len(self.places) :][:1]
        for place in known:
            if place.fits(x, y, n):
                self.places.append(place)
                return place
        raise Uncovered
