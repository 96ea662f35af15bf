"""A format that rounds nothing, and a method that scales by chance: what changes an output then is folded wrongly."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specdec.quant.format import Format, Part, register_format
from specdec.quant.methods import Method, register_method


class Exact(Format):
    name = "testexact"

    def parts(self, N, K):
        return {"codes": Part((N, K), torch.float64)}

    def pack(self, weight_NK):
        return {"codes": weight_NK.double()}

    def unpack(self, parts, dtype=torch.float32):
        return parts["codes"].to(dtype)


@dataclass(frozen=True)
class Chance(Method):
    """Scales between 1/4 and 4, other ones for each input."""

    only: str = "norm linear"

    @property
    def needs(self):
        return frozenset({"amax_K"})

    def scales(self, layers, stats, into, shared):
        if into not in self.only.split():
            return None
        seed = sum(map(ord, "".join(layer.name for layer in layers)))
        draws = torch.rand(len(stats.amax_K), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return shared(4 ** (2 * draws - 1))

    def round(self, weight_NK, format, stats):
        return format.pack(weight_NK)


register_format("testexact", lambda options: Exact())
register_method("testchance", Chance)
