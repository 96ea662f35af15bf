"""What the configuration of a model says of layers that lie in delta-CSC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdec.errors import InputError
from specdec.quant.delta_streams import GAPS

LAYOUT = "delta-csc"
VERSION = 1


def gaps_of(quantization_config: Mapping[str, Any]) -> dict[str, int]:
    """`{layer: gap width}` of the layers that lie in delta-CSC; none where nothing is said of storage. `InputError`
    for what cannot be read.
    """
    storage = quantization_config.get("storage")
    if storage is None:
        return {}
    gaps = storage.get("gaps") if isinstance(storage, Mapping) else None
    if gaps is None or not isinstance(gaps, Mapping) or storage.get("layout") != LAYOUT:
        raise InputError(f"the model's weights lie in a layout that is unknown here: {storage!r}")
    if storage.get("version") != VERSION:
        raise InputError(
            f"the model's weights lie in {LAYOUT} of version {storage.get('version')!r}; this specdec reads version "
            f"{VERSION}: update specdec"
        )
    for name, gap in gaps.items():
        if isinstance(gap, bool) or gap not in GAPS:
            raise InputError(f"{name} lies in {LAYOUT} with gaps of {gap!r} bits, which have {GAPS[0]} to {GAPS[-1]}")
    return dict(gaps)
