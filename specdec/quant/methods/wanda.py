"""Wanda: weights that matter little for what they are multiplied with are dropped (Sun et al., arXiv 2306.11695).

Shape suffixes: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from specdec.errors import InputError
from specdec.quant.format import Format
from specdec.quant.methods.method import Method, Stats, have, register_method
from specdec.quant.pruning import Pattern
from specdec.quant.sparse import Sparse


@dataclass(frozen=True)
class Wanda(Method):
    """Of each output's weights those with the largest |weight| * |input| are left, for formats of the sparse family.

    Each block sees what the pruned blocks before it give, as in `specdec.quant.pruning.wanda`. Lossless: no.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"norm_K"})

    def check(self, formats: Mapping[str, Format]) -> None:
        for name, format in formats.items():
            if not isinstance(format, Sparse):
                raise InputError(
                    f"wanda chooses which weights are dropped, and {format.name} drops none ({name}); use a format of "
                    "the sparse family, or the method awq or gptq"
                )

    def round(self, weight_NK: Tensor, format: Format, stats: Stats) -> dict[str, Tensor]:
        assert isinstance(format, Sparse)
        scores_NK = weight_NK.abs() * have(stats.norm_K, "norm_K").to(weight_NK)
        return format.pack(weight_NK.masked_fill(~Pattern.of(format).keep(scores_NK), 0))


register_method("wanda", Wanda)
