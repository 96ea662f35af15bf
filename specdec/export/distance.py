"""How far outputs are from others that should be the same.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

LOGITS = "logits"


@dataclass
class Distance:
    """How far one phase is from another, over all tokens of a text.

    `agreement`: share of tokens with the same first choice. `kl`: mean divergence KL(reference || other), nats. `sqnr`:
    of each output 10 log10 of its power over that of the difference, dB. `worst`: of the row whose logits are worst.
    `largest`: difference of two logits.
    """

    agreement: float = 0.0
    kl: float = 0.0
    sqnr: dict[str, float] = field(default_factory=dict)
    worst: float = math.inf
    largest: float = 0.0
    tokens: int = 0
    _power: dict[str, list[float]] = field(default_factory=dict)

    def add(self, reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
        """Outputs by name, `[T, .]` each, `logits` among them."""
        a_TV, b_TV = reference[LOGITS].double(), other[LOGITS].double()
        p_TV, q_TV = a_TV.log_softmax(-1), b_TV.log_softmax(-1)
        self.kl += float((p_TV.exp() * (p_TV - q_TV)).sum())
        self.agreement += float((a_TV.argmax(-1) == b_TV.argmax(-1)).sum())
        self.tokens += len(a_TV)
        difference_TV = a_TV - b_TV
        self.largest = max(self.largest, float(difference_TV.abs().max()))
        signal_T, noise_T = a_TV.square().sum(-1), difference_TV.square().sum(-1)
        self.worst = min(self.worst, *map(decibels, signal_T.tolist(), noise_T.tolist()))
        for name, output in reference.items():
            sums = self._power.setdefault(name, [0.0, 0.0])
            for at, of in enumerate((output.double(), output.double() - other[name].double())):
                sums[at] += float(of.square().sum())

    def done(self) -> Distance:
        self.kl, self.agreement = self.kl / self.tokens, self.agreement / self.tokens
        self.sqnr = {name: decibels(*sums) for name, sums in self._power.items()}
        return self

    def as_dict(self) -> dict[str, Any]:
        """For JSON: where nothing differs, decibels are None."""
        plain = {one.name: getattr(self, one.name) for one in fields(self) if not one.name.startswith("_")}
        plain["sqnr"] = {name: _finite(value) for name, value in self.sqnr.items()}
        return {**plain, "worst": _finite(self.worst)}


def decibels(signal: float, noise: float) -> float:
    """Of a ratio of powers; infinite where there is no noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
