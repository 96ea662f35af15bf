"""Speculative decoding that proves it is exact, explains when it is not, and tells beforehand whether it will pay."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder
    from specdec.generation import Generation
    from specdec.opening import load
    from specdec.quant.hf import IntConfig, MXConfig, QuantConfig, SparseConfig
    from specdec.sampling import Sampling

__version__ = version("specdec")
__all__ = [
    "Generation",
    "IntConfig",
    "MXConfig",
    "QuantConfig",
    "Sampling",
    "SparseConfig",
    "SpeculativeDecoder",
    "__version__",
    "load",
]

# Loaded on first use, so that `specdec --help` does not wait for torch.
_HOMES = {
    "Generation": "specdec.generation",
    "IntConfig": "specdec.quant.hf",
    "MXConfig": "specdec.quant.hf",
    "QuantConfig": "specdec.quant.hf",
    "Sampling": "specdec.sampling",
    "SparseConfig": "specdec.quant.hf",
    "SpeculativeDecoder": "specdec.api",
    "load": "specdec.opening",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'specdec' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
