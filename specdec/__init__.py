"""Speculative decoding that proves it is exact, explains when it is not, and tells beforehand whether it will pay."""

from importlib.metadata import version

from specdec.api import Generation, SpeculativeDecoder, load
from specdec.sampling import Sampling

__version__ = version("specdec")
__all__ = ["Generation", "Sampling", "SpeculativeDecoder", "__version__", "load"]
