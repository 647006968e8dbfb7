"""Problems: what the names stand for, that they repeat, and what is said when they cannot be made."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from backends.batch import call
from testbed.problems import DATA, LOSSES, MODELS, Problem, ProblemError, make_problem, register_model

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


def test_everything_is_made_on_the_cpu_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        made = small("simple_cnn")
    assert made.device == torch.device("cpu")
    assert torch.equal(made.inputs, small("simple_cnn").inputs)


# Data and options that make a small problem of a model; the others take data `random` as it is.
SMALL_IMAGES = {"shape": (3, 32, 32)}
SMALL_TOKENS = {"length": 6, "vocabulary": 50}
SMALL_TRANSFORMER = {"vocabulary": 50, "width": 24, "depth": 1, "heads": 2}
FITTING: dict[str, dict[str, Any]] = {
    "alexnet": {"data_options": {"shape": (3, 63, 63)}, "model_options": {"hidden": 8}},
    "bert": {"data": "tokens", "data_options": SMALL_TOKENS, "model_options": SMALL_TRANSFORMER},
    "cifar10_3c3d": {"data_options": SMALL_IMAGES},
    "embedding_classifier": {"data": "text"},
    "gpt2": {"data": "language", "data_options": SMALL_TOKENS, "model_options": SMALL_TRANSFORMER},
    "lstm_classifier": {"data": "text", "data_options": {"length": 6}, "model_options": {"width": 8}},
    "transformer": {"data": "tokens"},
    "vgg16": {"data_options": SMALL_IMAGES, "model_options": {"hidden": 8}},
    "vit": {"data_options": SMALL_IMAGES, "model_options": {"width": 24, "depth": 1, "heads": 2}},
}
OF_TRANSFORMERS = ("bert", "gpt2")


def fitting(model: str, loss: str = "cross_entropy") -> Problem:
    if model in OF_TRANSFORMERS:
        pytest.importorskip("transformers")
    return small(model, **{"data": "random", "loss": loss, **FITTING.get(model, {})})


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_model_and_loss_fit_together_where_the_targets_do(model: str, loss: str) -> None:
    p = fitting(model, loss)
    if (p.targets.dim() == 2) != loss.startswith("token"):
        return
    losses = p.loss_fn(call(p.model, p.inputs), p.targets)
    assert losses.shape == (4,)
    assert losses.isfinite().all()


@pytest.mark.parametrize("data", ["random", "digits", "tokens", "language"])
@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_model_fits_any_data_or_says_what_it_takes(model: str, data: str) -> None:
    if model in OF_TRANSFORMERS:
        pytest.importorskip("transformers")
    said = ""
    try:
        p = small(model, data, model_options=FITTING.get(model, {}).get("model_options"))
        call(p.model, p.inputs)
    except ProblemError as error:
        said = str(error)
    assert not said or re.match(f"model '{model}' (takes|has) .*data", said)


@pytest.mark.parametrize("model", sorted(MODELS))
def test_every_parameter_of_a_model_gets_a_gradient(model: str) -> None:
    p = fitting(model, "token_cross_entropy" if model == "gpt2" else "cross_entropy")
    p.loss_fn(call(p.model, p.inputs), p.targets).sum().backward()
    assert [name for name, q in p.model.named_parameters() if q.grad is None or not q.grad.any()] == []


PARAMETERS = {
    "cifar10_3c3d": (895_210, {"shape": (3, 32, 32), "classes": 10}),  # as BackPACK's paper counts
    "all_cnn_c": (1_387_108, {"shape": (3, 32, 32), "classes": 100}),  # likewise
    "wide_resnet": (2_748_890, {"shape": (3, 32, 32), "classes": 10}),  # De et al. write 2.7 million
}


@pytest.mark.parametrize("model", PARAMETERS)
def test_a_published_model_has_as_many_parameters_as_is_published(model: str) -> None:
    count, options = PARAMETERS[model]
    assert sum(p.numel() for p in small(model, data_options=options).model.parameters()) == count


@pytest.mark.parametrize("model", ["alexnet", "vgg16"])
def test_torchvisions_classifier_keeps_its_shape_at_full_width(model: str) -> None:
    import torchvision

    with torch.device("meta"):
        expected = getattr(torchvision.models, model)(num_classes=10)
    narrow = fitting(model).model
    shapes, found = ([tuple(p.shape) for p in m.parameters()] for m in (expected, narrow))
    assert found == [tuple(8 if n == 4096 else n for n in shape) for shape in shapes]


@pytest.mark.parametrize(("found", "said"), [(3, "an int"), (None, "nothing"), (torch.ones(1), "a Tensor")])
def test_a_model_that_is_none_is_refused(found: Any, said: str) -> None:
    register_model("no_model")(lambda example: found)
    with pytest.raises(ProblemError, match=f"^model 'no_model' returned {said}, not a torch.nn.Module$"):
        small("no_model")


def test_a_token_loss_is_the_mean_over_a_samples_own_tokens() -> None:
    outputs, targets = (
        torch.tensor([[[0.0, 0.0], [9.0, 0.0], [0.0, 0.0]]] * 2),
        torch.tensor([[0, -100, 1], [-100] * 3]),
    )
    found = LOSSES["token_cross_entropy"](outputs, targets)
    assert torch.allclose(found, torch.tensor([math.log(2), 0.0]))


def test_the_target_of_a_token_is_the_one_after_it() -> None:
    p = fitting("gpt2", "token_cross_entropy")
    assert torch.equal(p.inputs[:, 1:], p.targets[:, :-1])  # type: ignore[index]
    assert p.targets.shape == (4, 6)


def test_text_is_filled_up_in_front_and_has_frequent_tokens() -> None:
    options = {"length": 64, "vocabulary": 1000}
    tokens = make_problem("lstm_classifier", "text", "nll", data_options=options, batch_size=200).inputs
    assert isinstance(tokens, torch.Tensor)
    assert ((tokens == 0).int().diff(dim=1) <= 0).all()
    assert (tokens != 0).sum(1).min() >= 8
    assert (tokens == 1).sum() > 5 * (tokens == 20).sum()


@pytest.mark.parametrize("model", OF_TRANSFORMERS)
def test_without_transformers_one_line_says_what_to_install(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ProblemError, match=f"^model '{model}' needs the library transformers.*: pip install transformers$"
    ):
        small(model, "tokens")


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
        (
            {"model": "transformer", "data": "tokens", "model_options": {"width": 33}},
            "'transformer': width should be a multiple of heads=4 and of 2, found 33",
        ),
        ({"model": "alexnet", "data": "digits"}, "takes images .* of 63×63 pixels or more, the data has 1×28×28"),
        ({"model": "cifar_cnn", "data_options": {"shape": (9,)}}, "takes images .*, the data has 9"),
        ({"model": "vit", "data_options": {"shape": (1, 32, 32)}}, "patch=16, the data has 1×32×32"),
        ({"model": "wide_resnet", "model_options": {"depth": 17}}, "such as 10, 16 or 28; found 17"),
        ({"data": "digits", "batch_size": 2000}, "data 'digits' has 1797 samples, the batch size is 2000"),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, object], sentence: str) -> None:
    arguments = {"model": "mlp", "data": "random", "loss": "nll", "batch_size": 4} | options
    with pytest.raises(ProblemError, match=sentence):
        make_problem(**arguments)  # type: ignore[arg-type]


def test_data_of_another_size_are_no_batch() -> None:
    DATA.add("too_few", lambda n: DATA["random"](3))
    with pytest.raises(ProblemError, match="data 'too_few' cannot be made: 8 samples: ValueError: it returned 3"):
        make_problem("mlp", "too_few", "nll", batch_size=8)


def test_mse_compares_classes_one_hot() -> None:
    outputs, targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    assert LOSSES["mse"](outputs, targets).tolist() == [0.0, 1.0]
