"""What a caller may get wrong is refused by every backend, in words; what only looks wrong is right."""

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backends import available, backend_class, get_backend
from backends.base import Unsupported
from tests.asserts import assert_close
from tests.cases import DEVICE, Functional, cross_entropy, linear, real, squares

EVERY = [name for name in available() if "grads" in backend_class(name).quantities]

pytestmark = pytest.mark.usefixtures("own_random_state")

INPUTS, TARGETS = real(6, 5), torch.arange(6, device=DEVICE) % 4


def net(*, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).to(DEVICE, dtype)


@pytest.mark.parametrize("backend", EVERY)
def test_there_are_as_many_targets_as_inputs(backend: str) -> None:
    grads = get_backend(backend).grads(net(), cross_entropy)
    with pytest.raises(ValueError, match=r"targets .* 6 samples, found \[3\]"):
        grads(INPUTS, TARGETS[:3])
    with pytest.raises(ValueError, match=r"targets .* found list"):
        grads(INPUTS, TARGETS.tolist())  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", EVERY)
def test_a_batch_is_no_tree(backend: str) -> None:
    with pytest.raises(ValueError, match="a batch is a tensor"):
        get_backend(backend).grads(net(), cross_entropy)({"x": {"y": INPUTS}}, TARGETS)  # type: ignore[dict-item]


@pytest.mark.parametrize("backend", EVERY)
def test_sparse_inputs_are_refused(backend: str) -> None:
    with pytest.raises(Unsupported, match="dense tensors, found one of layout torch"):
        get_backend(backend).grads(net(), cross_entropy)(INPUTS.to_sparse(), TARGETS)


@pytest.mark.parametrize("backend", EVERY)
def test_a_parameter_that_has_other_memory_is_refused_and_a_step_is_seen(backend: str) -> None:
    model = net()
    grads, truth = (get_backend(b).grads(model, cross_entropy) for b in (backend, "naive"))
    before = grads(INPUTS, TARGETS)
    with torch.no_grad():
        model[0].weight.mul_(2)
    after = grads(INPUTS, TARGETS)
    torch.testing.assert_close(after, truth(INPUTS, TARGETS))
    assert not torch.equal(before["0.weight"], after["0.weight"])
    state = {name: p.clone() for name, p in model.state_dict().items()}
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()) * 2, model.parameters())
    with pytest.raises(Unsupported, match=r"`0.weight` has other memory than when this function was built"):
        grads(INPUTS, TARGETS)
    grads = get_backend(backend).grads(model, cross_entropy)
    model.load_state_dict(state, assign=True)
    with pytest.raises(Unsupported, match=r"`0.weight` has other memory .* or is another parameter"):
        grads(INPUTS, TARGETS)


def evaluate(model: nn.Module) -> None:
    model.eval()


def unfreeze(model: nn.Module) -> None:
    model[0].bias.requires_grad_(True)


def advance(model: nn.Module) -> None:
    model[3].running_mean.add_(1)


def anneal(model: nn.Module) -> None:
    model[1].p = 0.5


def append(model: nn.Module) -> None:
    model.append(nn.Tanh())


CHANGES = {
    evaluate: r"`training` is False, and was True when this function was built; build it anew",
    unfreeze: r"`0.bias` has requires_grad=True, and had False",
    advance: r"the buffer `3.running_mean` has other values than",
    anneal: r"`1.p` is 0.5, and was 0.0",
    append: r"the model has other modules than",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", EVERY)
def test_a_change_that_the_backends_copy_does_not_see_is_refused(
    backend: str, change: Callable[[nn.Module], None]
) -> None:
    model = nn.Sequential(linear(5, 4), nn.Dropout(0.0), nn.Tanh(), nn.BatchNorm1d(4)).to(DEVICE, torch.float64)
    model[0].bias.requires_grad_(False)
    model[3].eval().requires_grad_(False)
    grads = get_backend(backend).grads(model, cross_entropy)
    grads(INPUTS, TARGETS)
    model[3].running_mean.add_(0)  # its values are as they were
    grads(INPUTS, TARGETS)
    change(model)
    with pytest.raises(Unsupported, match=CHANGES[change]):
        grads(INPUTS, TARGETS)


@pytest.mark.parametrize("backend", EVERY)
def test_a_buffer_that_is_bound_to_a_weight_or_an_input_changes_neither(backend: str) -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        s.seen, s.last = s.a.weight.data, x.data[:1]
        return s.a(x)  # type: ignore[no-any-return]

    model = Functional(forward, a=linear(5, 4))
    model.register_buffer("seen", torch.zeros(4, 5))
    model.register_buffer("last", torch.zeros(1, 5))
    model.to(DEVICE, torch.float64)
    weight, inputs = model.a.weight.detach().clone(), INPUTS.clone()
    with suppress(Unsupported):  # not every library has these
        found = get_backend(backend).grads(model, cross_entropy)(inputs, TARGETS)
        torch.testing.assert_close(found, get_backend("naive").grads(model, cross_entropy)(inputs, TARGETS))
    assert torch.equal(model.a.weight, weight)
    assert torch.equal(inputs, INPUTS)


@pytest.mark.parametrize("backend", ["bookkeeping", "naive"])
def test_a_buffer_that_a_pass_binds_anew_is_given_back(backend: str) -> None:
    """Each sample, and each call, starts from the buffer that there was."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        s.scale = 2 * s.scale
        return s.a(x) * s.scale  # type: ignore[no-any-return]

    model = Functional(forward, a=linear(5, 4))
    model.register_buffer("scale", torch.ones(()))
    grads = get_backend(backend).grads(model.to(DEVICE, torch.float64), cross_entropy)
    found = [grads(INPUTS, TARGETS)["a.weight"].sum(0) for _ in range(2)]
    (truth,) = torch.autograd.grad(cross_entropy(model(INPUTS), TARGETS).sum(), model.a.weight)
    for each in found:
        assert_close(each, truth)


@pytest.mark.parametrize("backend", ["bookkeeping", "naive"])
def test_a_cache_may_grow(backend: str) -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        if x.shape[1] > len(s.cache):
            s.cache = torch.arange(x.shape[1], device=x.device, dtype=x.dtype).cos()
        return s.a(x * s.cache[: x.shape[1], None]).sum(1)  # type: ignore[no-any-return]

    model = Functional(forward, a=linear(5, 4))
    model.register_buffer("cache", torch.empty(0))
    grads = get_backend(backend).grads(model.to(DEVICE, torch.float64), cross_entropy)
    for n, length in ((6, 3), (1, 5), (6, 4)):
        inputs, targets = real(n, length, 5), TARGETS[:n]
        found = grads(inputs, targets)["a.weight"]
        assert_close(found.sum(0), torch.autograd.grad(cross_entropy(model(inputs), targets).sum(), model.a.weight)[0])
        model.cache = torch.empty(0, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("backend", EVERY)
def test_a_loss_that_uses_the_model_itself_is_refused(backend: str) -> None:
    model = net()
    grads = get_backend(backend).grads(model, lambda o, t: cross_entropy(o, t) + model[2].weight.square().sum())
    with pytest.raises(Unsupported, match=r"`2.weight` of the model itself is used"):
        grads(INPUTS, TARGETS)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", EVERY)
def test_a_model_that_finds_its_layer_elsewhere_is_refused(backend: str) -> None:
    layer = linear(5, 4).to(DEVICE, torch.float64)

    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return layer(x)  # type: ignore[no-any-return]

    with pytest.raises(Unsupported):  # a library may refuse it first, in its own words
        get_backend(backend).grads(Elsewhere(), cross_entropy)(INPUTS, TARGETS)


def test_a_default_may_hold_a_layer() -> None:
    layers = nn.ModuleList([linear(5, 5), linear(5, 4)]).to(DEVICE, torch.float64)
    model = Functional(lambda s, x: s.steps[1](s.steps[0](x)), layers=layers)
    model.steps = [lambda x, layer=layer: layer(x).tanh() for layer in layers]  # type: ignore[misc]
    model.steps[1] = lambda x, *, layer=layers[1]: layer(x).tanh()
    found = get_backend("bookkeeping").grads(model, cross_entropy)(INPUTS, TARGETS)
    truth = torch.autograd.grad(cross_entropy(model(INPUTS[:1]), TARGETS[:1]).sum(), list(model.parameters()))
    torch.testing.assert_close([g[0] for g in found.values()], list(truth))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", EVERY)
def test_a_hook_on_a_gradient_is_refused(backend: str) -> None:
    model = net()
    model[0].weight.register_hook(lambda g: g * 0)
    with pytest.raises(Unsupported, match=r"`0.weight` has a hook on its gradient"):
        get_backend(backend).grads(model, cross_entropy)


@pytest.mark.parametrize("backend", EVERY)
def test_what_has_no_values_is_refused(backend: str) -> None:
    with pytest.raises(Unsupported, match=r"`0.weight` has no shape yet"):
        get_backend(backend).grads(nn.Sequential(nn.LazyLinear(4)), cross_entropy)
    with pytest.raises(Unsupported, match=r"`0.weight` is on the meta device"):
        get_backend(backend).grads(nn.Sequential(nn.Linear(5, 4, device="meta")), cross_entropy)
    with pytest.raises(TypeError, match=r"model should be a torch.nn.Module, found NoneType"):
        get_backend(backend).grads(None, cross_entropy)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", EVERY)
def test_what_a_pass_has_left_is_named(backend: str) -> None:
    def forward(s: nn.Module, x: Tensor) -> Tensor:
        s.a.features = [s.a(x)]
        return s.a.features[0]  # type: ignore[no-any-return,union-attr,index]

    model = Functional(forward, a=linear(5, 4)).to(DEVICE, torch.float64)
    model(INPUTS)
    with pytest.raises(Unsupported, match=r"cannot be copied \(`a.features` holds a tensor that autograd has made"):
        get_backend(backend).grads(model, cross_entropy)


def test_a_model_that_changes_its_weights_is_refused_and_they_stay() -> None:
    weight = nn.Parameter(real(9, 5) * 10)
    model = Functional(lambda s, x: s.a(F.embedding(x, s.w, max_norm=1.0)), a=linear(5, 4), w=weight).double()
    before = weight.detach().clone()
    with pytest.raises(Unsupported, match="the model changes its parameter `w` while it runs"):
        get_backend("bookkeeping").grads(model.to(DEVICE), cross_entropy)(TARGETS, TARGETS)
    assert torch.equal(weight.cpu(), before.cpu())


def test_a_model_that_clamps_its_weights_is_refused_and_they_stay() -> None:
    model = Functional(lambda s, x: (s.a.weight.data.clamp_(-0.1, 0.1), s.a(x))[1], a=linear(5, 4)).to(DEVICE).double()
    before = model.a.weight.detach().clone()
    with pytest.raises(Unsupported, match=r"the model changes its parameter `a.weight` while it runs"):
        get_backend("bookkeeping").grads(model, cross_entropy)(INPUTS, TARGETS)
    assert torch.equal(model.a.weight, before)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("quantity", ["grads", "norms", "clipped_sum"])
@pytest.mark.parametrize("backend", ["bookkeeping", "naive", "vmap"])
def test_inference_mode_is_left(backend: str, quantity: str) -> None:
    model = net()
    truth = getattr(get_backend("naive"), quantity)(model, cross_entropy)(INPUTS, TARGETS)
    with torch.inference_mode():
        inputs, targets = INPUTS.clone(), TARGETS.clone()
        inside = getattr(get_backend(backend), quantity)(model, cross_entropy)(inputs, targets)
    outside = getattr(get_backend(backend), quantity)(model, cross_entropy)(inputs, targets)
    for found in (inside, outside):
        torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("quantity", ["norms", "clipped_sum", "variance", "gram"])
def test_of_complex_parameters_there_are_gradients_only(quantity: str) -> None:
    model = nn.Linear(5, 4, dtype=torch.complex128, device=DEVICE)
    with pytest.raises(Unsupported, match="`weight` is complex: of complex parameters there are only `grads`"):
        getattr(get_backend("bookkeeping"), quantity)(model, squares)


def test_what_a_look_leaves_is_put_back() -> None:
    """A state that a model keeps as a plain attribute is that of the samples before, not of those looked at."""

    def forward(s: nn.Module, x: Tensor) -> Tensor:
        s.kept = torch.tanh(s.a(x) + (0 if s.kept is None or len(s.kept) != len(x) else s.kept)).detach() + 0 * s.a(x)
        return s.b(s.kept)

    model = Functional(forward, a=linear(5, 5), b=linear(5, 4)).to(DEVICE, torch.float64)
    model.kept = None
    ours, loop = (get_backend(b).grads(model, cross_entropy)(INPUTS[:1], TARGETS[:1]) for b in ("bookkeeping", "naive"))
    torch.testing.assert_close(ours, loop)
