"""The exact oracle: every random choice of a drafting law and a verifier enumerated on toy models."""

from specdec.oracle.certificate import TOLERANCE, Measurement, Result, applicable, certify, complete, measure
from specdec.oracle.chance import EnumeratedChance, OracleError, enumerate_outcomes
from specdec.oracle.comparison import Cell, compare_trees
from specdec.oracle.laws import LAWS, Law, ModelLaw
from specdec.oracle.toy import Toy, ToySession

__all__ = [
    "LAWS",
    "TOLERANCE",
    "Cell",
    "EnumeratedChance",
    "Law",
    "Measurement",
    "ModelLaw",
    "OracleError",
    "Result",
    "Toy",
    "ToySession",
    "applicable",
    "certify",
    "compare_trees",
    "complete",
    "enumerate_outcomes",
    "measure",
]
