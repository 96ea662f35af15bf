"""Native CPU kernels, linear and attention over a cache: a row's bits do not depend on the rows beside it."""

from specdec.kernels.ops import attend, available, isa, isas, linear, set_isa, slots, steps, why_not

__all__ = ["attend", "available", "isa", "isas", "linear", "set_isa", "slots", "steps", "why_not"]
