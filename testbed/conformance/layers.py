"""Cases of every parametrised layer of torch.nn: each constructor option that changes the mathematics, each layout.

What to try is in the tables of `families.py`.
"""

from testbed.conformance.case import Case
from testbed.conformance.families import FAMILIES


def layer_cases() -> list[Case]:
    """Return the cases of all layers, none of them built."""
    return [one for family in FAMILIES for one in family()]
