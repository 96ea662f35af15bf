"""Round to nearest: what every format does by itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specdec.quant.format import Format
from specdec.quant.methods.method import Method, Stats, register_method


@dataclass(frozen=True)
class RoundToNearest(Method):
    """Each weight becomes the nearest that its format has; needs no calibration text. Lossless: no."""

    def round(self, weight_NK: Tensor, format: Format, stats: Stats) -> dict[str, Tensor]:
        return format.pack(weight_NK)


register_method("rtn", RoundToNearest)
