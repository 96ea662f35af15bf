"""Drafters, one file each (imported as `specdec.drafters`)."""

from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.suffix import SuffixDrafter

__all__ = ["ModelDrafter", "NgramDrafter", "NoDrafter", "SuffixDrafter"]
