"""Drafters, one file each (imported as `specdec.drafters`); a file is read when its drafter is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.drafters.cross_vocab import CrossVocabDrafter
    from specdec.drafters.eagle import EagleDrafter
    from specdec.drafters.early_exit import EarlyExitDrafter
    from specdec.drafters.hybrid import HybridDrafter
    from specdec.drafters.lookahead import LookaheadDrafter
    from specdec.drafters.medusa import MedusaDrafter
    from specdec.drafters.model import ModelDrafter
    from specdec.drafters.ngram import NgramDrafter
    from specdec.drafters.none import NoDrafter
    from specdec.drafters.parallel import ParallelDrafter
    from specdec.drafters.self_quant import SelfQuantDrafter
    from specdec.drafters.suffix import SuffixDrafter

_FILES = {
    "CrossVocabDrafter": "cross_vocab",
    "EagleDrafter": "eagle",
    "EarlyExitDrafter": "early_exit",
    "HybridDrafter": "hybrid",
    "LookaheadDrafter": "lookahead",
    "MedusaDrafter": "medusa",
    "ModelDrafter": "model",
    "NgramDrafter": "ngram",
    "NoDrafter": "none",
    "ParallelDrafter": "parallel",
    "SelfQuantDrafter": "self_quant",
    "SuffixDrafter": "suffix",
}

__all__ = [
    "CrossVocabDrafter",
    "EagleDrafter",
    "EarlyExitDrafter",
    "HybridDrafter",
    "LookaheadDrafter",
    "MedusaDrafter",
    "ModelDrafter",
    "NgramDrafter",
    "NoDrafter",
    "ParallelDrafter",
    "SelfQuantDrafter",
    "SuffixDrafter",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"specdec.drafters has no {name!r}")
    return getattr(importlib.import_module(f"specdec.drafters.{_FILES[name]}"), name)
