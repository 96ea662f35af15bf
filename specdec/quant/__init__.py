"""Weights in fewer bits: formats, the layer that multiplies with them, recipes for whole models."""

from specdec.quant import integer, mx, sparse  # registers their formats
from specdec.quant.format import Format, format_names, parse, register_format
from specdec.quant.linear import PackedLinear, named_packed

__all__ = [
    "Format",
    "PackedLinear",
    "format_names",
    "integer",
    "mx",
    "named_packed",
    "parse",
    "register_format",
    "sparse",
]
