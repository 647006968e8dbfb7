"""Models that draw: dropout is run over the batch, as an ordinary step's; what else may be drawn is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backends import get_backend
from backends.base import own_copy
from backends.ops.passes import Passes
from backends.ops.ways import Ways
from tests.asserts import assert_close
from tests.cases import DEVICE, Functional, linear, real, squares
from tests.habits import over_the_batch
from tests.test_passes import LAYOUTS

pytestmark = pytest.mark.usefixtures("own_random_state")

OF_TORCH = DEVICE.type == "cpu"
"""Whether recurrent layers draw by torch's generator. On CUDA, cuDNN has one of its own; these run under vmap then."""

MODELS: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "dropout": (lambda s, x: s.b(F.dropout(s.a(x).tanh())), True),
    "channels": (lambda s, x: s.b(F.dropout1d(s.a(x).tanh(), 0.3)), True),
    "attention": (lambda s, x: s.a(F.scaled_dot_product_attention(s.a(x), s.b(x), x, dropout_p=0.3)), True),
    "an LSTM": (lambda s, x: s.lstm(s.a(x))[0], OF_TORCH),
    "a GRU, both ways": (lambda s, x: s.gru(s.a(x).transpose(0, 1))[0].transpose(0, 1), OF_TORCH),
    "a GRU, centred": (lambda s, x: s.gru(((h := s.a(x)) - h.mean(0)).transpose(0, 1))[0].transpose(0, 1), False),
    "a layer of attention": (lambda s, x: s.m(h := s.a(x), h, h, need_weights=False)[0], True),
    "a layer of attention, with weights": (lambda s, x: s.m(h := s.a(x), h, h)[0], True),
    "a layer of attention, centred": (lambda s, x: s.m(h := s.a(x) - s.a(x).mean(0), h, h)[0], False),
    "a shared mask": (lambda s, x: s.b(s.a(x) * F.dropout(torch.ones(1, 1, 5, device=x.device, dtype=x.dtype))), True),
    "noise": (lambda s, x: s.b(s.a(x) + 0.1 * torch.randn_like(x)), False),
    "mixed pairs": (lambda s, x: s.b(s.a(x) + 0.1 * x[torch.randperm(len(x), device=x.device)]), False),
    "mixed, one batch in a million": (
        lambda s, x: s.b(s.a(x) + torch.rand((), device=x.device, dtype=x.dtype).lt(1e-6) * x.roll(1, 0)),
        False,
    ),
    "mixed pairs of what is left": (lambda s, x: s.b(s.a(h := F.dropout(x)) + 0.1 * h[torch.randperm(len(h))]), False),
    "centred": (lambda s, x: s.b(F.dropout((h := s.a(x)) - h.mean(0))), False),
    "centred after": (lambda s, x: (h := s.b(F.dropout(s.a(x)))) - 1e-3 * h.mean(0), False),
}


def model_of(forward: Callable[..., Tensor]) -> nn.Module:
    layers = {
        "a": linear(5, 5),
        "b": linear(5, 5),
        "e": nn.Embedding(6, 5),
        "m": nn.MultiheadAttention(5, 1, dropout=0.4, batch_first=True),
        "lstm": nn.LSTM(5, 3, 2, dropout=0.4, batch_first=True),
        "gru": nn.GRU(5, 3, 3, dropout=0.4, bidirectional=True),
    }
    model = Functional(forward, **layers)
    model.shared = nn.Parameter(real(1, 1, 5))
    return model.to(DEVICE, torch.float64)


def seeded(run: Callable[[], Any]) -> Any:
    torch.manual_seed(3)
    return run()


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_an_ordinary_steps(name: str) -> None:
    """Of the same seed, gradients are those of each sample's loss in an ordinary pass."""
    forward, same = MODELS[name]
    model, (inputs, targets) = model_of(forward), (real(6, 2, 5).to(DEVICE), real(6).to(DEVICE))
    assert over_the_batch(model, inputs, targets) == same
    if same:
        passes = Passes(own_copy(model), squares)
        fn = get_backend("bookkeeping").grads(model, squares)
        for _ in range(2):  # a first call draws as others do
            truth = seeded(lambda: passes.among(inputs, targets, range(6)))
            found = seeded(lambda: fn(inputs, targets))
            for name, g in found.items():
                assert_close(g, torch.stack([t[name] for t in truth]))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "other random numbers"])
def test_dropout_hides_nothing(name: str) -> None:
    """Samples that see each other are seen behind dropout, too."""
    forward, same = LAYOUTS[name]
    model = model_of(lambda s, x: forward(s, F.dropout(x, 0.2)))
    assert over_the_batch(model, real(6, 2, 5).to(DEVICE), real(6).to(DEVICE)) == same


def test_a_larger_batch_is_held_against_plain_autograd_of_what_it_draws() -> None:
    """A share of what there is is left out from eight samples on."""

    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.a(F.dropout(x, 0.2))
        return s.b(h - h.mean(0) if len(x) > 7 else h)  # type: ignore[no-any-return]

    ways = Ways(Passes(own_copy(model_of(forward)), squares))
    assert ways.way(real(6, 2, 5).to(DEVICE), real(6).to(DEVICE)).name == "over the batch"
    assert ways.way(real(9, 2, 5).to(DEVICE), real(9).to(DEVICE)).name != "over the batch"


def test_weights_over_their_largest_are_not_hidden_by_dropout() -> None:
    """In the first batch each sample reaches the largest; what it would be alone, dropout lets nobody compare."""
    model = model_of(lambda s, x: s.b(F.dropout(s.a(x / x.max()))))
    first = torch.rand(6, 2, 5).clamp(max=0.9).to(DEVICE, torch.float64)
    first[:, 0, 0] = 1.0
    assert not over_the_batch(model, first, real(6).to(DEVICE))


def test_what_is_tried_again_draws_the_same() -> None:
    """Between batches with and without masks, a pass is begun that is not the right one."""

    def forward(s: Any, x: Tensor, mask: Tensor) -> Tensor:
        h = F.dropout(s.a(x), 0.3)
        return s.b(h if mask.all() else h * mask[..., None])  # type: ignore[no-any-return]

    model, passes = (m := model_of(forward)), Passes(own_copy(m), squares)
    fn = get_backend("bookkeeping").grads(model, squares)
    x, targets, masks = real(6, 2, 5).to(DEVICE), real(6).to(DEVICE), [torch.ones(6, 2), torch.ones(6, 2)]
    masks[1][:, 1] = 0
    for mask in [masks[k].to(DEVICE) for k in (0, 1, 0, 1)]:
        truth = seeded(lambda mask=mask: passes.among((x, mask), targets, range(6)))
        found = seeded(lambda mask=mask: fn((x, mask), targets))
        for name, g in found.items():
            assert_close(g, torch.stack([t[name] for t in truth]))


@pytest.mark.parametrize("quantity", ["grads", "norms"])
def test_dropout_in_a_checkpoint_is_run(quantity: str) -> None:
    """One that is reentrant allows for `backward()` only."""
    model = model_of(lambda s, x: checkpoint(lambda z: F.dropout(s.a(z).tanh(), 0.3), s.b(x), use_reentrant=True))
    found = getattr(get_backend("bookkeeping"), quantity)(model, squares)(real(6, 5), real(6))
    found = found["a.weight"] if isinstance(found, dict) else found
    assert found.isfinite().all()
    assert found.flatten(1).any(1).all() if quantity == "grads" else found.all()
