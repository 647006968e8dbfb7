"""Whole-model cases: what people write around the layers, each with the reason why a library might get it wrong."""

from testbed.conformance import surroundings, weights
from testbed.conformance.case import Case


def model_cases() -> list[Case]:
    """Return the whole-model cases, none of them built."""
    return [one for group in (*weights.GROUPS, *surroundings.GROUPS) for one in group()]
