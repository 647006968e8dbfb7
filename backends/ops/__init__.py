"""Rules for ops that have parameters. A rule is one function; importing this package registers them all."""

from backends.ops import conv as conv
from backends.ops import linear as linear
from backends.ops import norm as norm
