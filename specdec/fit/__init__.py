"""Fitting a tree to a target, a drafter and a machine: acceptance by rank and depth, measured costs, the best shape."""

from specdec.fit.fitting import fit
from specdec.fit.optimum import best_tree, expected_tokens
from specdec.fit.plan import FittedTree, TreePlan
from specdec.fit.ranks import RankTable, measure_ranks

__all__ = ["FittedTree", "RankTable", "TreePlan", "best_tree", "expected_tokens", "fit", "measure_ranks"]
