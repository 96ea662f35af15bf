"""Verification rules, one file each (imported as `specdec.verifiers`)."""

from specdec.verifiers.block import Block
from specdec.verifiers.coupled import Coupled
from specdec.verifiers.greedy import Greedy
from specdec.verifiers.greedy_multi import GreedyMulti
from specdec.verifiers.match import Match
from specdec.verifiers.ratio import Ratio
from specdec.verifiers.recursive import Recursive
from specdec.verifiers.traversal import Traversal
from specdec.verifiers.typical import Typical

__all__ = ["Block", "Coupled", "Greedy", "GreedyMulti", "Match", "Ratio", "Recursive", "Traversal", "Typical"]
