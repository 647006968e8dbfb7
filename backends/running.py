"""Running a model or a library without a trace: buffers and random state are kept, failures become refusals."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from backends.base import LossFn, Named, Unsupported, describe, first_line, own_copy, trainable
from backends.batch import Batch, call, size, take
from backends.graphs import recording
from backends.shortage import lack_of_memory


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Give the model its buffers back at the end, with their values, so that each call starts from the same state.

    What a forward pass has put in the place of one may be a part of something else: nothing is written to it.
    """
    found = [
        (m._buffers, name, b, b.clone()) for m in modules(model) for name, b in m._buffers.items() if b is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, name, b, before in found:
                now = buffers.get(name)
                if now is not None and now.shape == b.shape:  # a cache may come, go or grow meanwhile
                    buffers[name] = b
                    b.data.copy_(before)  # what autograd has kept of one that was not changed stays good


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Give the model's modules back the attributes, parameters and buffers they had, at the end; values are not kept.

    `functional_call` leaves its own in a module that has two names.
    """
    found = [d for m in modules(model) for d in (vars(m), m._parameters, m._buffers)]
    before = [(d, dict(d)) for d in found]
    try:
        yield
    finally:
        for now, then in before:
            now.clear()
            now.update(then)


def modules(model: nn.Module) -> list[nn.Module]:
    """Return a model's modules; `model.modules()` makes their names too, at 5 % of the time of a small transformer."""
    found = {id(model): model}
    waiting = [model]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


@contextmanager
def kept_random_state(model: nn.Module) -> Iterator[None]:
    """Give the global random state of the CPU and of the model's devices back at the end."""
    # a GPU's cannot be read while a graph is recorded; what the host draws then is drawn all the same
    with torch.random.fork_rng([] if recording() else _gpus(model)):
        yield


@contextmanager
def drawn_again(model: nn.Module) -> Iterator[None]:
    """Give the global random state back where the block fails: what is tried again draws the same."""
    gpus = [] if recording() else _gpus(model)
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in gpus]
    try:
        yield
    except BaseException:
        torch.set_rng_state(states[0])
        for gpu, state in zip(gpus, states[1], strict=True):
            torch.cuda.set_rng_state(state, gpu)
        raise


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Seed the global random state in the block, that of the CPU and of the model's devices.

    `torch.manual_seed` would seed the other GPUs as well, and for good: only what is forked is given back.
    """
    with kept_random_state(model):
        torch.default_generator.manual_seed(seed)
        for gpu in _gpus(model):
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


def _gpus(model: nn.Module) -> list[int]:
    on_gpu = (p for p in model.parameters() if p.is_cuda) if torch.cuda.is_initialized() else ()
    return sorted({p.device.index or 0 for p in on_gpu})


@contextmanager
def library_call(
    original: nn.Module, used: nn.Module, loss_fn: LossFn, inputs: Batch, targets: Tensor, *, buffers: bool = True
) -> Iterator[None]:
    """Surround a library's forward and backward pass: gradients on, buffers and random state kept, failures refused.

    What fails with a library, and not without it, becomes a refusal in the library's own words.

    Args:
        original: The caller's model, which the library has not touched.
        used: The model as the library runs it.
        loss_fn: The loss; with `inputs` and `targets`, what is being computed.
        inputs: The batch.
        targets: Its targets.
        buffers: Whether they are kept here; the block may see to that.

    Raises:
        Unsupported: The block failed, though an ordinary forward and backward pass of one sample works.
        ValueError: The inputs are no batch, or one of no samples.
    """
    size(inputs)
    try:
        with torch.enable_grad(), kept_buffers(used) if buffers else nullcontext(), kept_random_state(used):
            yield
    except Unsupported:
        raise
    except Exception as error:
        if lack_of_memory(error):
            raise
        try:
            one = slice(0, 1)
            batch_gradient(original, loss_fn, take(inputs, one), take(targets, one))
        except Exception:
            raise error from None
        where = culprit(error, used)
        if "BackwardHookFunction" in str(error):  # autograd's words for it do not help a user
            raise Unsupported(f"{where} modifies in place the output of a module with a backward hook") from error
        raise Unsupported(f"{where}: {first_sentence(error)}") from error


def batch_gradient(model: nn.Module, loss_fn: LossFn, inputs: Batch, targets: Tensor) -> Named:
    """Return the gradient of the summed losses by ordinary autograd: what per-sample gradients must sum to."""
    plain = own_copy(model)
    with torch.enable_grad(), kept_random_state(plain):
        torch.autograd.backward(loss_fn(call(plain, inputs), targets).sum())
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trainable(plain).items()}


def culprit(error: BaseException, model: nn.Module) -> str:
    """Return the innermost module of `model` that the error arose in, described; else "the model"."""
    paths = {id(module): path for path, module in model.named_modules()}
    frames = [frame.f_locals.values() for frame, _ in traceback.walk_tb(error.__traceback__)]
    held = [m for values in frames for m in values if isinstance(m, nn.Module) and id(m) in paths]
    inner = [m for m in held if m is not model] or held  # a library's frames often hold the model too
    return describe(paths[id(inner[-1])], inner[-1], options=True) if inner else "the model"


def first_sentence(error: BaseException, longest: int = 200) -> str:
    """Return what a library says first of an error; some go on with advice for its developers."""
    text = re.split(r"\. (?=[A-Z])", first_line(error))[0]  # not after "e.g."
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
