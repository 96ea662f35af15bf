"""Native CPU kernels whose results for a row do not depend on the rows beside it: linear, and attention over a cache."""

from specdec.kernels.ops import attend, available, isa, isas, linear, set_isa, slots, steps, why_not

__all__ = ["attend", "available", "isa", "isas", "linear", "set_isa", "slots", "steps", "why_not"]
