"""Problems: what the names stand for, that they repeat, and what is said when they cannot be made."""

from pathlib import Path

import pytest
import torch
from torch import nn

from backends.batch import call
from testbed.problems import DATA, LOSSES, MODELS, Problem, ProblemError, make_problem

OFFLINE = ("mnist", "fashion_mnist", "cifar10")


def small(model: str = "mlp", data: str = "random", loss: str = "nll", **options: object) -> Problem:
    return make_problem(model, data, loss, batch_size=4, **options)  # type: ignore[arg-type]


def test_simple_cnn_is_the_tutorials() -> None:
    shapes = {name: tuple(p.shape) for name, p in small("simple_cnn").model.named_parameters()}
    assert shapes == {
        "conv1.weight": (32, 1, 3, 3),
        "conv1.bias": (32,),
        "conv2.weight": (64, 32, 3, 3),
        "conv2.bias": (64,),
        "fc1.weight": (128, 9216),
        "fc1.bias": (128,),
        "fc2.weight": (10, 128),
        "fc2.bias": (10,),
    }


TOKEN_MODELS = ("transformer",)


@pytest.mark.parametrize("data", ["random", "digits", "tokens"])
@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_model_data_and_loss_fit_or_say_why_not(model: str, data: str, loss: str) -> None:
    if (data == "tokens") != (model in TOKEN_MODELS):
        with pytest.raises(ProblemError, match=f"model '{model}' takes"):
            small(model, data, loss)
        return
    p = small(model, data, loss)
    losses = p.loss_fn(call(p.model, p.inputs), p.targets)
    assert losses.shape == (4,)
    assert losses.isfinite().all()


def test_the_same_seed_gives_the_same_problem() -> None:
    a, b, other = small(seed=1), small(seed=1), small(seed=2)
    assert torch.equal(a.inputs, b.inputs)  # type: ignore[arg-type]
    assert torch.equal(a.fresh_targets, b.fresh_targets)
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert not torch.equal(a.inputs, other.inputs)  # type: ignore[arg-type]


def test_the_fresh_batch_is_another_one() -> None:
    p = small()
    assert not torch.equal(p.inputs, p.fresh_inputs)  # type: ignore[arg-type]


def test_training_lowers_the_loss() -> None:
    def loss(p: Problem) -> float:
        return float(p.loss_fn(call(p.model, p.inputs), p.targets).mean().detach())

    assert loss(small("logistic", "digits", train_steps=100)) < 0.7 * loss(small("logistic", "digits"))


def test_a_dtype_reaches_model_and_inputs() -> None:
    p = small(dtype=torch.bfloat16)
    assert p.inputs.dtype == p.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert p.targets.dtype == torch.long


def test_a_loss_that_holds_tensors_follows_the_dtype() -> None:
    p = Problem(small().model, nn.CrossEntropyLoss(weight=torch.ones(2), reduction="none"), *[torch.zeros(1)] * 4)
    assert p.to(torch.float64).loss_fn.weight.dtype == torch.float64  # type: ignore[attr-defined]


def test_digits_are_real_and_scaled() -> None:
    p = small("simple_cnn", "digits")
    assert p.inputs.shape == (4, 1, 28, 28)  # type: ignore[union-attr]
    assert 0.2 < float(p.inputs.mean()) < 0.4  # type: ignore[union-attr]
    assert float(p.inputs.max()) <= 1.0  # type: ignore[union-attr]


@pytest.mark.parametrize("data", OFFLINE)
def test_offline_says_what_was_tried_and_what_to_use(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    def offline(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Error downloading train-images\nsecond line")

    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    for name in ("MNIST", "FashionMNIST", "CIFAR10"):
        monkeypatch.setattr(datasets, name, offline)
    with pytest.raises(ProblemError) as error:
        DATA[data](4)
    text = str(error.value)
    assert "\n" not in text
    assert all(part in text for part in (f"'{data}'", str(tmp_path), "Error downloading", "use data 'digits'"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "simple_cnn", "data_options": {"shape": (3, 32, 32)}}, "takes 1×28×28 inputs with 10 outputs"),
        ({"model": "simple_cnn", "data_options": {"classes": 3}}, "the data has 1×28×28 with 3"),
        (
            {"model": "group_norm_cnn", "model_options": {"width": 6}},
            "made with {'width': 6}: ValueError: num_channels",
        ),
        ({"model": "transformer", "data": "tokens", "data_options": {"vocabulary": 999}}, "has vocabulary=100"),
        ({"data": "digits", "batch_size": 2000}, "data 'digits' has 1797 samples, the batch size is 2000"),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, object], sentence: str) -> None:
    arguments = {"model": "mlp", "data": "random", "loss": "nll", "batch_size": 4} | options
    with pytest.raises(ProblemError, match=sentence):
        make_problem(**arguments)  # type: ignore[arg-type]


def test_mse_compares_classes_one_hot() -> None:
    outputs, targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    assert LOSSES["mse"](outputs, targets).tolist() == [0.0, 1.0]
