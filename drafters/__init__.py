"""Drafters, one file each (imported as `specdec.drafters`)."""

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
