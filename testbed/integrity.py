"""Was everything left as it was? A snapshot of the caller's model, batch and global state that tells, and puts back."""

import gc
import os
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.nn.modules import module as module_internals

from backends.batch import tensors
from backends.precision import SWITCHES
from testbed.problems.base import Problem

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "PyTorch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "PyTorch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "PyTorch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "PyTorch's deterministic mode": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "PyTorch's precision of float32": (
        lambda: [s.fp32_precision for s in SWITCHES],
        lambda found: _set_precision(found),
    ),
    "PyTorch's anomaly mode": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    "PyTorch's use of oneDNN": (lambda: mkldnn.enabled, lambda found: mkldnn.set_flags(found)),
    "the garbage collector": (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    "the working directory": (os.getcwd, os.chdir),
}
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class Snapshot:
    """A model's parameters, buffers, gradients, hooks and modes, a batch, and PyTorch's global state, as they were."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor] | None = None) -> None:
        self.model, self.batch = model, dict(batch or {})
        held: list[dict[str, Any]] = [d for m in model.modules() for d in (m._parameters, m._buffers, m._modules)]
        self._structure = [(found, dict(found)) for found in held]
        self._things: list[Any] = [*model.parameters(), *model.modules()]
        self._hook_dicts = _hook_dicts(model)
        self._values = {name: t.detach().clone() for name, t in self._tensors().items()}
        self._grads = {name: p.grad for name, p in model.named_parameters()}
        self._trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        self._hooks = [dict(found) for found in self._hook_dicts]
        self._modes = {path: m.training for path, m in model.named_modules()}
        self._own = [set(vars(thing)) for thing in self._things]
        self._on_tensors = [_hooks_of(p) for p in model.parameters()]
        self._random, self._others = _random_state(), _other_random_states()
        self._settings = {name: read() for name, (read, _) in SETTINGS.items()}

    @classmethod
    def of(cls, problem: Problem) -> "Snapshot":
        """Return the snapshot of a problem's model and batch."""
        batch = {f"input {i}": t for i, t in enumerate(tensors(problem.inputs))}
        return cls(problem.model, {**batch, "targets": problem.targets})

    def change(self) -> str | None:
        """Return what has been changed, in words; None if nothing."""
        now = self._tensors()
        if now.keys() != self._values.keys():
            return f"names of parameters and buffers: {', '.join(sorted(now.keys() ^ self._values.keys()))}"
        for held, those in self._structure:
            for name, was in those.items():
                if _is_fixed(was) and held.get(name) is not was:
                    return f"which {'module' if isinstance(was, nn.Module) else 'parameter'} is `{name}`"
            if new := held.keys() - those.keys():
                return f"names in a module: {', '.join(sorted(new))}"
        for name, before in self._values.items():
            if now[name].shape != before.shape or not torch.equal(_known(now[name]), _known(before)):
                return f"the values of `{name}`"
        for name, p in self.model.named_parameters():
            if p.grad is not self._grads[name]:
                return f"the `.grad` of `{name}`"
            if p.requires_grad != self._trainable[name]:
                return f"whether `{name}` is trained"
        if [dict(found) for found in self._hook_dicts] != self._hooks:
            return "hooks of the model, or of all modules"
        for path, module in self.model.named_modules():
            if module.training != self._modes[path]:
                return f"train/eval mode of `{path or 'model'}`"
        if [_hooks_of(p) for p in self.model.parameters()] != self._on_tensors:
            return "hooks of the parameters"
        for thing, own in zip(self._things, self._own, strict=True):
            if new := set(vars(thing)) ^ own:
                return f"the attribute `{sorted(new)[0]}` of a parameter or module"
        if _other_random_states() != self._others:
            return "the random state of Python or NumPy"
        if any(not torch.equal(a, b) for a, b in zip(_random_state(), self._random, strict=True)):
            return "the global random state"
        changed = [name for name, (read, _) in SETTINGS.items() if read() != self._settings[name]]
        return changed[0] if changed else None

    def restore(self) -> None:
        """Put everything back."""
        for held, those in self._structure:
            now = {name: was if _is_fixed(was) else held.get(name, was) for name, was in those.items()}
            held.clear()
            held.update(now)
        for name, (_, write) in SETTINGS.items():
            write(self._settings[name])
        for found, before in zip(self._hook_dicts, self._hooks, strict=True):
            found.clear()
            found.update(before)
        with torch.no_grad():
            for name, t in self._tensors().items():
                if name in self._values and t.shape == self._values[name].shape:
                    t.copy_(self._values[name])
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._trainable.get(name, p.requires_grad))
            p.grad = self._grads.get(name)
        for path, module in self.model.named_modules():
            module.training = self._modes.get(path, module.training)
        for p, hooks in zip(self.model.parameters(), self._on_tensors, strict=True):
            for kind, earlier in zip(TENSOR_HOOKS, hooks, strict=True):
                if (now := getattr(p, kind)) is not None:
                    now.clear()
                    now.update(earlier)
        for thing, own in zip(self._things, self._own, strict=True):
            for name in set(vars(thing)) - own:
                del vars(thing)[name]
        random.setstate(self._others[0])
        np.random.set_state(self._others[1])
        torch.set_rng_state(self._random[0])
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.set_rng_state_all(self._random[1:])

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers()), **self.batch}


def _is_fixed(held: object) -> bool:
    """Return whether a module keeps what it holds; a forward pass may put another buffer in the place of one."""
    return isinstance(held, nn.Parameter | nn.Module)


def _hook_dicts(model: nn.Module) -> list[dict[int, Any]]:
    of_all = [getattr(module_internals, kind) for kind in GLOBAL_HOOKS]
    return [*(getattr(module, kind) for module in model.modules() for kind in HOOKS), *of_all]


def _hooks_of(p: nn.Parameter) -> list[dict[int, Any]]:
    return [dict(getattr(p, kind) or {}) for kind in TENSOR_HOOKS]


def _set_precision(found: list[str]) -> None:
    for switch, was in zip(SWITCHES, found, strict=True):
        if switch.fp32_precision != was:
            switch.fp32_precision = was


def _other_random_states() -> tuple[Any, Any]:
    name, numbers, *others = np.random.get_state()
    return random.getstate(), (name, tuple(numbers), *others)


def _known(t: Tensor) -> Tensor:
    """Return the numbers of a tensor with NaN as zero, so that equal tensors compare equal."""
    return t.detach().nan_to_num() if t.is_floating_point() else t.detach()


def _random_state() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]
