"""What a model takes: one line says what it wants and what the data has."""

from torch import Tensor

from testbed.problems.base import ProblemError, Samples


def floats(model: str, example: Samples) -> Tensor:
    """Return the inputs, one floating-point tensor [N, ...].

    Raises:
        ProblemError: They have another form.
    """
    if not isinstance(example.inputs, Tensor) or not example.inputs.is_floating_point():
        raise ProblemError(f"model '{model}' takes one floating-point tensor as input, the data has another form")
    return example.inputs


def images(model: str, example: Samples, *, least: int = 1) -> Tensor:
    """Return the inputs, images [N, channels, height, width].

    Args:
        model: Its name.
        example: The data.
        least: Pixels a side that the model needs at least.

    Raises:
        ProblemError: They are no images, or too small.
    """
    found = floats(model, example)
    if found.dim() != 4 or min(found.shape[2:]) < least:
        shape = "×".join(map(str, found.shape[1:]))
        raise ProblemError(
            f"model '{model}' takes images (channels × height × width) of {least}×{least} pixels or more, "
            f"the data has {shape}"
        )
    return found


def tokens(model: str, example: Samples, vocabulary: int) -> Tensor:
    """Return the inputs, token sequences [N, length].

    Args:
        model: Its name.
        example: The data.
        vocabulary: How many tokens the model knows.

    Raises:
        ProblemError: They are none, or the model knows fewer tokens.
    """
    found = example.inputs
    if not isinstance(found, Tensor) or found.is_floating_point() or found.dim() != 2:
        raise ProblemError(f"model '{model}' takes token sequences, such as data 'tokens'")
    if int(found.max()) >= vocabulary:
        raise ProblemError(f"model '{model}' has vocabulary={vocabulary}, the data has token {int(found.max())}")
    return found
