"""Drafters, one file each (imported as `specdec.drafters`)."""

from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.parallel import ParallelDrafter
from specdec.drafters.suffix import SuffixDrafter

__all__ = [
    "EagleDrafter",
    "HybridDrafter",
    "LookaheadDrafter",
    "MedusaDrafter",
    "ModelDrafter",
    "NgramDrafter",
    "NoDrafter",
    "ParallelDrafter",
    "SuffixDrafter",
]
