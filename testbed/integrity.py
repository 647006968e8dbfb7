"""Was the caller's model left as it was? A snapshot that tells, and that puts things back."""

import torch
from torch import Tensor, nn


class Snapshot:
    """A model's parameters, buffers, gradients, hooks and modes, and the random state, as they were."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._values = {name: t.detach().clone() for name, t in _tensors(model).items()}
        self._grads = {name: p.grad for name, p in model.named_parameters()}
        self._hooks = _hooks(model)
        self._modes = {path: m.training for path, m in model.named_modules()}
        self._random = _random_state()

    def change(self) -> str | None:
        """Return what a backend has changed, in words; None if nothing."""
        now = _tensors(self.model)
        if now.keys() != self._values.keys():
            return f"names of parameters and buffers: {', '.join(sorted(now.keys() ^ self._values.keys()))}"
        for name, before in self._values.items():
            if not torch.equal(now[name].detach().nan_to_num(), before.nan_to_num()):
                return f"the values of `{name}`"
        for name, p in self.model.named_parameters():
            if p.grad is not self._grads[name]:
                return f"the `.grad` of `{name}`"
        if _hooks(self.model) != self._hooks:
            return "its hooks"
        for path, module in self.model.named_modules():
            if module.training != self._modes[path]:
                return f"train/eval mode of `{path or 'model'}`"
        if any(not torch.equal(a, b) for a, b in zip(_random_state(), self._random, strict=True)):
            return "the global random state"
        return None

    def restore(self) -> None:
        """Put values, gradients, modes and the random state back; hooks cannot be."""
        with torch.no_grad():
            for name, t in _tensors(self.model).items():
                if name in self._values:
                    t.copy_(self._values[name])
        for name, p in self.model.named_parameters():
            p.grad = self._grads.get(name)
        for path, module in self.model.named_modules():
            module.training = self._modes.get(path, module.training)
        torch.set_rng_state(self._random[0])
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.set_rng_state_all(self._random[1:])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _hooks(model: nn.Module) -> list[int]:
    return [
        len(getattr(module, kind))
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]


def _random_state() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]
