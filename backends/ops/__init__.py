"""Rules for ops that have parameters. A rule is one function; importing this package registers them all."""

from backends.ops import attention as attention
from backends.ops import conv as conv
from backends.ops import einsum as einsum
from backends.ops import elementwise as elementwise
from backends.ops import hooks as hooks
from backends.ops import linear as linear
from backends.ops import norm as norm
from backends.ops import recurrent as recurrent
